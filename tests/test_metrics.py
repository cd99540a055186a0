import cv2
import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from mscs.metrics import boundary_counts, boundary_scores, confusion_matrix, majority_miou, scores


def test_scores_of_a_matrix_worked_by_hand():
    result = scores(np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]]))
    assert result["class_iou"] == [pytest.approx(100 * 6 / 9), pytest.approx(50.0), None]
    assert result["miou"] == pytest.approx((100 * 6 / 9 + 50) / 3)
    assert scores(np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]]), "skip")["miou"] == pytest.approx(
        58.3333, abs=1e-3
    )
    assert result["pixel_accuracy"] == pytest.approx(75.0)
    assert result["mean_accuracy"] == pytest.approx((75 + 75 + 0) / 3)
    assert result["frequency_weighted_iou"] == pytest.approx((8 * 600 / 9 + 4 * 50) / 12)


def test_confusion_and_iou_agree_with_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 7, (3, 40, 50), generator=generator)
    label = torch.randint(0, 7, (3, 40, 50), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    ours = confusion_matrix(prediction, label, 7)
    theirs = MulticlassConfusionMatrix(7, ignore_index=255)(prediction, label)
    assert torch.equal(ours, theirs)
    jaccard = MulticlassJaccardIndex(7, average="macro", ignore_index=255)(prediction, label)
    assert scores(ours)["miou"] == pytest.approx(100 * jaccard.item(), rel=1e-6)


def test_always_answering_the_largest_class():
    matrix = np.array([[50, 10, 0], [20, 5, 0], [5, 5, 5]])
    assert majority_miou(matrix) == pytest.approx(100 * (60 / 100) / 3)


def test_wrong_shapes_and_classes_are_errors():
    with pytest.raises(ValueError, match="differ in shape"):
        confusion_matrix(torch.zeros(2, 2, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long), 4)
    with pytest.raises(ValueError, match="not below 2"):
        confusion_matrix(torch.tensor([5]), torch.tensor([1]), 2)


def test_nothing_to_score_is_zero():
    assert scores(np.zeros((3, 3)))["miou"] == 0


def square(top, left, side=6, size=(20, 20)):
    mask = torch.zeros(size, dtype=torch.long)
    mask[top : top + side, left : left + side] = 1
    return mask


def test_boundary_counts_worked_by_hand():
    """Diagonal 28.3 px: 0.02 of it is rounded to the distance 1, so a boundary is one pixel wide."""
    label, prediction = square(7, 7), square(7, 8)
    counts = boundary_counts(prediction, label, 3)
    # two rings of 20 pixels, one column apart, share 5 pixels of the upper and 5 of the lower edge
    assert counts[:, 1].tolist() == [10, 30]
    assert counts[:, 2].tolist() == [0, 0]
    perfect = boundary_scores(boundary_counts(label, label, 2))
    assert perfect == {"boundary_miou": 100.0, "class_boundary_iou": [100.0, 100.0]}
    assert boundary_scores(counts)["class_boundary_iou"][1:] == [pytest.approx(100 / 3), None]


def test_boundary_counts_leave_ignored_pixels_out_and_add_up():
    label = square(7, 7)
    label[:, 10:] = 255
    counts = boundary_counts(square(7, 8), label, 2)
    # left of column 10: the true ring has 3 + 3 + 4, ours 2 + 2 + 4 pixels; 2 + 2 are common
    assert counts[:, 1].tolist() == [4, 14]
    assert boundary_counts(square(7, 8), torch.full_like(label, 255), 2).sum() == 0


@pytest.mark.parametrize("ratio", [0.02, 0.1])
def test_boundary_regions_are_those_of_iterated_3x3_erosion(ratio):
    noise = np.random.default_rng(0).random((60, 80)).astype(np.float32)
    label = (cv2.GaussianBlur(noise, (0, 0), 6) > 0.5).astype(np.uint8)
    steps = max(1, round(ratio * 100))
    masks = [(label == index).astype(np.uint8) for index in (0, 1)]
    padded = [cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0) for mask in masks]
    eroded = [cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=steps)[1:-1, 1:-1] for mask in padded]
    expected = [int((mask - inner).sum()) for mask, inner in zip(masks, eroded, strict=True)]
    tensor = torch.from_numpy(label.astype(np.int64))
    assert boundary_counts(tensor, tensor, 2, ratio=ratio).tolist() == [expected, expected]
