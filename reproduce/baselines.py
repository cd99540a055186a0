"""How far one gets on generated data without looking at shapes: a classifier that sees one pixel's colour."""

import numpy as np
import torch

from mscs.datasets import Dataset
from mscs.metrics import confusion_matrix, scores

BINS = 16


def colour_miou(train: Dataset, val: Dataset) -> float:
    """Return the mIoU, in percent over the classes present, of the best answer per colour.

    Colours fall into 16 bins per channel; each bin answers its most frequent class among all training
    pixels, which is the Bayes decision of a per-pixel colour classifier at that resolution.
    """
    votes = np.zeros((BINS**3, train.num_classes), dtype=np.int64)
    for sample in (train[i] for i in range(len(train))):
        counted = sample.label != train.ignore_index
        np.add.at(votes, (_bins(sample.image)[counted], sample.label[counted]), 1)
    answer = torch.from_numpy(votes.argmax(1))
    total = torch.zeros(val.num_classes, val.num_classes, dtype=torch.int64)
    for sample in (val[i] for i in range(len(val))):
        prediction = answer[torch.from_numpy(_bins(sample.image))]
        total += confusion_matrix(prediction, torch.from_numpy(sample.label), val.num_classes)
    return float(scores(total, "skip")["miou"])  # type: ignore[arg-type]


def _bins(image: np.ndarray) -> np.ndarray:
    """Return the bin number (H, W) of each pixel's colour."""
    return (image.astype(np.int64) * BINS // 256) @ np.array([BINS * BINS, BINS, 1])
