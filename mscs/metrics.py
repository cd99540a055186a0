"""Confusion matrix and the scores that follow from it. Knows integers only: no models, no files."""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count pixels per (true class, predicted class).

    prediction, label: integer tensors of one shape, values 0..num_classes-1 (label also ignore_index).
    Returns (num_classes, num_classes) int64 on the same device; rows are true classes.
    """
    if prediction.shape != label.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape"
        )
    valid = label != ignore_index
    pairs = label[valid].long() * num_classes + prediction[valid].long()
    counts = torch.bincount(pairs, minlength=num_classes**2)
    if counts.numel() > num_classes**2:
        raise ValueError(f"a label or prediction is not below {num_classes}")
    return counts.reshape(num_classes, num_classes)


def scores(confusion: Tensor | np.ndarray, absent: Literal["zero", "skip"] = "zero") -> dict[str, object]:
    """Return mIoU and its kin, in percent, from a (K, K) confusion matrix with true classes as rows.

    A class that neither occurs nor is predicted has no IoU: "zero" counts it as 0 in the means (the
    authors' code), "skip" leaves it out.
    """
    matrix = np.asarray(confusion, dtype=np.float64)
    true, predicted, hit = matrix.sum(1), matrix.sum(0), np.diag(matrix)
    iou = _ratio(hit, true + predicted - hit)
    recall = _ratio(hit, true)
    total = true.sum()
    return {
        "miou": _mean(iou, absent),
        "class_iou": [None if np.isnan(value) else 100 * float(value) for value in iou],
        "pixel_accuracy": 100 * float(hit.sum() / total) if total else 0.0,
        "mean_accuracy": _mean(recall, absent),
        "frequency_weighted_iou": 100 * float(np.nansum(iou * true) / total) if total else 0.0,
    }


def boundary_counts(
    prediction: Tensor, label: Tensor, num_classes: int, ignore_index: int = 255, ratio: float = 0.02
) -> Tensor:
    """Count, per class, the pixels of the intersection and the union of predicted and true boundary regions.

    The boundary region of a mask (H, W) is what square erosion by `ratio` of the diagonal removes;
    beyond the image is background (Cheng et al., Boundary IoU, CVPR 2021). Ignored pixels are not counted and
    are taken to be as predicted, so that no true boundary arises where the annotation ends.
    Returns (2, num_classes) int64 on the same device; counts of several images add up.
    """
    distance = max(1, round(ratio * math.hypot(*label.shape)))
    valid = label != ignore_index
    label = torch.where(valid, label, prediction)
    counts = torch.zeros(2, num_classes, dtype=torch.int64, device=label.device)
    for index in torch.cat([prediction.unique(), label.unique()]).unique().tolist():
        ours, true = (_boundary(mask == index, distance) & valid for mask in (prediction, label))
        counts[0, index] = (ours & true).sum()
        counts[1, index] = (ours | true).sum()
    return counts


def boundary_scores(
    counts: Tensor | np.ndarray, absent: Literal["zero", "skip"] = "zero"
) -> dict[str, object]:
    """Return the boundary IoU per class and its mean, in percent, from summed `boundary_counts`."""
    intersection, union = np.asarray(counts, dtype=np.float64)
    iou = _ratio(intersection, union)
    classes = [None if np.isnan(value) else 100 * float(value) for value in iou]
    return {"boundary_miou": _mean(iou, absent), "class_boundary_iou": classes}


def _boundary(mask: Tensor, distance: int) -> Tensor:
    """Return the pixels of `mask` (H, W) bool that a square of side 2 * distance + 1 does not fit around."""
    inside = mask
    for axis in (0, 1):
        # a pixel survives where the window's sum, a difference of two running sums, is full
        sums = F.pad(inside.movedim(axis, -1).int(), (distance + 1, distance)).cumsum(-1)
        window = 2 * distance + 1
        inside = (sums[:, window:] - sums[:, :-window] == window).movedim(-1, axis)
    return mask & ~inside


def majority_miou(confusion: Tensor | np.ndarray, absent: Literal["zero", "skip"] = "zero") -> float:
    """Return the mIoU, in percent, of always answering the most frequent true class."""
    true = np.asarray(confusion).sum(1)
    constant = np.zeros((len(true), len(true)), dtype=np.int64)
    constant[:, true.argmax()] = true
    return float(scores(constant, absent)["miou"])  # type: ignore[arg-type]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)


def _mean(values: np.ndarray, absent: str) -> float:
    if np.isnan(values).all():
        return 0.0
    return 100 * float(np.nan_to_num(values).mean() if absent == "zero" else np.nanmean(values))
