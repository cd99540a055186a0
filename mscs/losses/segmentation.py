"""Cross-entropy over groups of images, so that its value does not depend on the number of processes.

A group is the images that are contrasted and averaged together, however many processes share a batch. The
authors sampled and averaged per GPU (2 to 4 images). Fixing the group instead of the process makes one
process with four groups compute what four processes with one group each compute.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_groups(batch: int, images_per_group: int | None) -> int:
    """Return how many images form a group; a batch that does not divide into groups is a ValueError."""
    per_group = batch if images_per_group is None else images_per_group
    if batch == 0 or per_group < 1 or batch % per_group:
        raise ValueError(
            f"a batch of {batch} images does not divide into groups of {images_per_group}; "
            "the batch on each process must be a multiple of images_per_group"
        )
    return per_group


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
    images_per_group: int | None = None,
) -> Tensor:
    """Return the mean over groups of images of each group's (class-weighted) cross-entropy.

    Inside a group the mean is weighted as in `torch.nn.functional.cross_entropy`: the sum over pixels of
    weight times negative log-likelihood over the sum of weights. A group whose pixels are all ignored
    contributes 0, still attached to the graph, and is counted in the mean.

    Args:
        logits: (B, K, H, W), any float dtype; evaluated in float32 at least, also inside autocast.
        labels: (B, H, W) integer, 0..K-1 or `ignore_index`.
        class_weights: (K,) or None for equal weights.
        ignore_index: label of the pixels that do not count.
        images_per_group: images averaged together; None means the whole batch.

    Raises:
        ValueError: shapes do not fit, the batch is not a multiple of `images_per_group`, or a label is
            outside the range (looked at on the CPU only; on CUDA the device's own assertion fails).
    """
    if logits.dim() != 4 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
            "expected (B, K, H, W) and (B, H, W)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, found {labels.dtype}")
    if class_weights is not None and class_weights.shape != logits.shape[1:2]:
        raise ValueError(
            f"class_weights have shape {tuple(class_weights.shape)} for {logits.shape[1]} classes"
        )
    per_group = check_groups(len(logits), images_per_group)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        labels = labels.long()
        weights = logits.new_ones(logits.shape[1]) if class_weights is None else class_weights.to(logits)
        valid = labels != ignore_index
        if labels.device.type == "cpu":  # elsewhere a look at the labels would make the host wait every step
            _check_range(labels[valid], logits.shape[1], ignore_index)
        loss = F.cross_entropy(logits, labels, weight=weights, ignore_index=ignore_index, reduction="none")
        weight = weights[labels.where(valid, 0)] * valid
        total, mass = (t.reshape(-1, per_group * t[0].numel()).sum(dim=1) for t in (loss, weight))
        return (total / mass.masked_fill(mass == 0, 1)).mean()


def _check_range(labels: Tensor, classes: int, ignore_index: int) -> None:
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ValueError(
            f"labels must be 0..{classes - 1} or ignore_index = {ignore_index}; found "
            f"{outside.unique()[:5].tolist()}. Map them, or set ignore_index to the value of the pixels that "
            "do not count"
        )
