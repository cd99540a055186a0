"""Predictions as files: the raw values and names that each benchmark's own evaluation reads.

Cityscapes: `<city>_<seq>_<frame>_pred_labelIds.png`, 8-bit grey, labelIds. ADE20K: `<image>.png`, indexed
colour, 1..150. The other two have no official format; theirs are indexed PNGs with the first raw label value
of each class, so that a written prediction can be read back as a label of the dataset.

A picture of the user's own gets three files: those ids, the classes' colours, and these over the picture.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mscs.datasets import Dataset, LabelSet, Sample
from mscs.errors import UsageError
from mscs.results import atomic_path, inside

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
"""Of the pictures in a folder."""
OPACITY = 0.6
"""Of the colours over a picture."""


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


def pictures_in(paths: Sequence[Path]) -> list[Path]:
    """Return the pictures that files and folders stand for, those of a folder sorted by name.

    Raises:
        UsageError: a path that does not exist, a folder without pictures, or two pictures of one name, whose
            predictions would overwrite each other.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise UsageError(f"no image or folder {path}")
        listed = (
            sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        )
        if not listed:
            raise UsageError(f"{path} holds no images; looked for {', '.join(SUFFIXES)}")
        for picture in listed:
            if picture.stem in found:
                raise UsageError(
                    f"{found[picture.stem]} and {picture} would have predictions of one name; "
                    "predict one after the other, with another --out"
                )
            found[picture.stem] = picture
    return list(found.values())


def write_views(folder: Path, labels: LabelSet, name: str, image: np.ndarray, prediction: np.ndarray) -> None:
    """Write ids/, color/ and overlay/ of a picture.

    Args:
        folder: where these folders lie.
        labels: what the training ids mean.
        name: of the picture, without a suffix.
        image: uint8 (H, W, 3), RGB.
        prediction: integer (H, W), training ids.
    """
    write_prediction(folder / "ids", labels, name, prediction)
    color = Image.fromarray(np.array(labels.colors, np.uint8)[prediction])
    for kind, view in (("color", color), ("overlay", Image.blend(Image.fromarray(image), color, OPACITY))):
        with atomic_path(inside(folder / kind, f"{name}.png")) as temporary:
            view.save(temporary, format="PNG")
