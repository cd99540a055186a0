import pytest
import torch
import torch.nn.functional as F

from mscs.losses import segmentation_loss


def _batch(images: int = 4, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, classes, 6, 7, generator=generator)
    labels = torch.randint(classes, (images, 6, 7), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return logits, labels


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("images_per_group", [None, 1, 2])
def test_mean_over_groups_of_the_weighted_mean(images_per_group: int | None, weighted: bool) -> None:
    logits, labels = _batch()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0]) if weighted else None
    found = segmentation_loss(logits, labels, class_weights=weights, images_per_group=images_per_group)
    size = images_per_group or 4
    parts = [
        F.cross_entropy(logits[i : i + size], labels[i : i + size], weight=weights, ignore_index=255)
        for i in range(0, 4, size)
    ]
    torch.testing.assert_close(found, torch.stack(parts).mean())


def test_an_ignored_group_is_a_counted_attached_zero() -> None:
    logits, labels = _batch()
    labels[2:] = 255
    logits.requires_grad_()
    loss = segmentation_loss(logits, labels, images_per_group=2)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(logits[:2], labels[:2], ignore_index=255) / 2)
    assert (logits.grad[2:] == 0).all()
    nothing = segmentation_loss(logits, torch.full_like(labels, 255))
    assert nothing == 0
    assert nothing.requires_grad


def test_another_ignore_index_and_float32_inside_autocast() -> None:
    logits, labels = _batch()
    moved = labels.where(labels != 255, -1).to(torch.int32)
    expected = segmentation_loss(logits.half().float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = segmentation_loss(logits.half(), moved, ignore_index=-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_misuse_is_named() -> None:
    logits, labels = _batch()
    with pytest.raises(ValueError, match=r"expected \(B, K, H, W\)"):
        segmentation_loss(logits, labels[:, :3])
    with pytest.raises(ValueError, match="multiple of images_per_group"):
        segmentation_loss(logits, labels, images_per_group=3)


@pytest.mark.parametrize("found", [-100, -1, 7])
def test_labels_out_of_range_are_named(found: int) -> None:
    logits, labels = _batch()
    classes = logits.shape[1]
    labels = labels.clone()
    labels[0, 0, 0] = found if found < 0 else classes
    with pytest.raises(
        ValueError, match=rf"0\.\.{classes - 1} or ignore_index = 255; found \[{labels[0, 0, 0]}\]"
    ):
        segmentation_loss(logits, labels)
