"""Predictions as files: the raw values and names that each benchmark's own evaluation reads.

Cityscapes: `<city>_<seq>_<frame>_pred_labelIds.png`, 8-bit grey, labelIds. ADE20K: `<image>.png`, indexed
colour, 1..150. The other two have no official format; theirs are indexed PNGs with the first raw label value
of each class, so that a written prediction can be read back as a label of the dataset.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mscs.datasets import Dataset, LabelSet, Sample
from mscs.results import atomic_path, inside


def write_prediction(folder: Path, labels: LabelSet, sample_id: str, prediction: np.ndarray) -> Path:
    """Write the predicted training ids (H, W) uint8 of one image; return the file."""
    raw = np.array([values[0] for values in labels.raw_ids], dtype=np.uint8)
    image, name = Image.fromarray(raw[prediction]), f"{sample_id}.png"
    if labels.dataset == "cityscapes":
        name = f"{sample_id}_pred_labelIds.png"
    else:
        palette = np.zeros((256, 3), np.uint8)
        palette[raw] = labels.colors
        image.putpalette(palette.tobytes())
    path = inside(folder, name)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def prediction_saver(root: Path) -> Callable[[str, Dataset, Sample, np.ndarray], None]:
    """Return what writes every prediction to `root`/<mode>-seed-<seed>."""

    def save(name: str, dataset: Dataset, sample: Sample, prediction: np.ndarray) -> None:
        write_prediction(root / name, dataset.labels, sample.id, prediction)

    return save
