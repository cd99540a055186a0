import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from mscs.metrics import confusion_matrix, majority_miou, scores


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
