"""Confusion matrix and the scores that follow from it. Knows integers only: no models, no files."""

from typing import Literal

import numpy as np
import torch
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
