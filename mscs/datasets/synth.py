"""Writes generated scenes in a dataset's real layout and label encoding, for the profile without real data.

The readers of this package cannot tell the difference, apart from the marker file `generated.json`, which
records how the tree was made. Every file is a function of the arguments of `write_dataset` alone, byte for
byte. See `mscs.datasets.scenes` for what is drawn.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mscs.datasets import scenes
from mscs.datasets.labels import cadis_raw_classes, cadis_videos, check_dataset, label_set
from mscs.errors import MscsError, UsageError
from mscs.seeding import numpy_generator

VERSION = 1
MARKER = "generated.json"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Recipe:
    """How one dataset is generated."""

    draw: Callable[[scenes.Canvas], None]
    size: tuple[int, int]
    """Default (height, width); the largest where sizes vary."""
    smallest: float
    """Sides are drawn between this fraction of the size and the size."""
    unlabelled: int
    paths: Callable[[str, int], tuple[str, str]]
    """From (split, index) to the image and label files."""


def _cityscapes_paths(split: str, index: int) -> tuple[str, str]:
    city = (
        ("aachen", "bochum", "bremen")[index % 3] if split == "train" else ("frankfurt", "munster")[index % 2]
    )
    name = f"{split}/{city}/{city}_{index:06d}_000019"
    return f"leftImg8bit/{name}_leftImg8bit.png", f"gtFine/{name}_gtFine_labelIds.png"


def _ade20k_paths(split: str, index: int) -> tuple[str, str]:
    folder = {"train": "training", "val": "validation"}[split]
    name = f"{folder}/ADE_{split}_{index + 1:08d}"
    return f"ADEChallengeData2016/images/{name}.jpg", f"ADEChallengeData2016/annotations/{name}.png"


def _pascal_name(split: str, index: int) -> str:
    return f"{2008 if split == 'train' else 2009}_{index + 1:06d}"


def _pascal_paths(split: str, index: int) -> tuple[str, str]:
    name = _pascal_name(split, index)
    return f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg", f"SegmentationClassContext59/{name}.png"


def _cadis_paths(split: str, index: int) -> tuple[str, str]:
    videos = cadis_videos(split)
    video = videos[index % len(videos)]
    name = f"Video{video}_frame{10 * (index // len(videos) + 1):06d}.png"
    return f"Video{video:02d}/Images/{name}", f"Video{video:02d}/Labels/{name}"


def _one_of(*draws: Callable[[scenes.Canvas], None]) -> Callable[[scenes.Canvas], None]:
    return lambda canvas: draws[canvas.rng.integers(len(draws))](canvas)


# Names that the scenes use, where the dataset's differ; what a dataset has no name for is left unlabelled.
# ADE20K shows 14 of its classes, all of rooms; Pascal-Context 21, of streets and pastures: many more would
# each be too rare to learn in the few steps of the laptop profile.
ALIASES = {
    "cityscapes": {},
    "ade20k": {"window": "windowpane"},
    "pascal_context": {
        "vegetation": "tree",
        "terrain": "grass",
        "earth": "ground",
        "rider": "person",
        "motorcycle": "motorbike",
    },
}

RECIPES = {
    "cityscapes": Recipe(scenes.street, (128, 256), 1.0, 0, _cityscapes_paths),
    "ade20k": Recipe(
        scenes.room,
        (128, 160),
        0.75,
        0,
        _ade20k_paths,
    ),
    "pascal_context": Recipe(
        _one_of(
            partial(scenes.street, quiet=("standing", "parked")),
            partial(scenes.landscape, animals=tuple(scenes.ANIMALS)),
        ),
        (128, 160),
        0.75,
        0,
        _pascal_paths,
    ),
    "cadis": Recipe(scenes.surgery, (135, 240), 1.0, 0, _cadis_paths),
}


def class_values(name: str) -> dict[str, int]:
    """Return the raw label value of every class name that scenes of dataset `name` may paint."""
    if name == "cadis":
        return {label: value for value, label in enumerate(cadis_raw_classes())}
    labels = label_set(name)
    values = {label.strip(): raw[0] for label, raw in zip(labels.classes, labels.raw_ids, strict=True)}
    return values | {drawn: values[known] for drawn, known in ALIASES[name].items()}


def render(
    name: str, split: str, index: int, *, seed: int = 0, image_size: tuple[int, int] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one scene: image uint8 (H, W, 3) RGB and raw label values uint8 (H, W)."""
    recipe = RECIPES[name]
    rng = numpy_generator(seed, "scene", name, split, index)
    sides = np.array(image_size or recipe.size) * rng.uniform(recipe.smallest, 1.0, size=2)
    height, width = (int(side) for side in sides)
    canvas = scenes.Canvas((height, width), rng, class_values(name), recipe.unlabelled)
    recipe.draw(canvas)
    return canvas.develop()


def write_dataset(
    name: str,
    root: Path,
    *,
    seed: int = 0,
    train: int,
    val: int,
    image_size: tuple[int, int] | None = None,
    progress: bool = True,
) -> None:
    """Write a generated dataset into the folder `root`; a finished tree with the same arguments is kept.

    Processes that ask for the same tree at once wait for the first one to draw it.

    Args:
        name: cityscapes, ade20k, pascal_context or cadis.
        root: the dataset's root folder; appears whole or not at all, and replaces an older generated tree.
        seed: of all scenes.
        train: number of training images.
        val: number of validation images.
        image_size: (H, W), each at least 32; None means the dataset's default (see `RECIPES`).
        progress: show a progress bar where stderr is a terminal.

    Raises:
        UsageError: unknown dataset, impossible number or size, or `root` holds what was not generated.
        MscsError: a file cannot be written.
    """
    check_dataset(name)
    size = tuple(image_size or RECIPES[name].size)
    if train < 1 or val < 1 or len(size) != 2 or min(size) < 32:
        raise UsageError(
            f"cannot generate {train} + {val} images of {size} pixels. Accepted: at least 1 image per split, "
            "(height, width) of at least 32 pixels each"
        )
    made = {
        "dataset": name,
        "seed": seed,
        "train": train,
        "val": val,
        "image_size": list(size),
        "version": VERSION,
    }
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(root.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not _is_made(root, made):
            _replace_tree(name, root, made, progress)
    finally:
        os.close(folder)


def _is_made(root: Path, made: dict[str, object]) -> bool:
    """Return whether `root` holds just this tree; what was not generated is left alone, with UsageError."""
    marker = root / MARKER
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file; name a folder for the dataset")
    if root.exists() and not marker.is_file() and any(root.iterdir()):
        raise UsageError(
            f"{root} is not empty and was not generated (no {MARKER}), so it is left alone. "
            "Name another folder, or remove this one"
        )
    return marker.is_file() and json.loads(marker.read_text()) == made


def _replace_tree(name: str, root: Path, made: dict[str, Any], progress: bool) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        counts = {split: made[split] for split in SPLITS}
        _write_tree(name, work, made["seed"], counts, made["image_size"], progress)
        (work / MARKER).write_text(json.dumps(made, indent=2) + "\n")
        work.chmod(0o755)
        if root.exists():
            shutil.rmtree(root)
        work.rename(root)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_tree(
    name: str, root: Path, seed: int, counts: dict[str, int], size: list[int], progress: bool
) -> None:
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    for split, index in tqdm(jobs, desc=f"draw {name}", unit="image", disable=None if progress else True):
        picture, label = render(name, split, index, seed=seed, image_size=(size[0], size[1]))
        image_path, label_path = RECIPES[name].paths(split, index)
        _write_image(root / image_path, picture[..., ::-1])
        _write_image(root / label_path, label)
    for path, text in extra_files(name, counts):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def extra_files(name: str, counts: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the other files that the dataset's layout asks for, as (path, text)."""
    if name == "pascal_context":
        for split, count in counts.items():
            lines = "".join(f"{_pascal_name(split, index)}\n" for index in range(count))
            yield f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt", lines


def _write_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = [cv2.IMWRITE_JPEG_QUALITY, 92] if path.suffix == ".jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 6]
    if not cv2.imwrite(str(path), np.ascontiguousarray(pixels), options):
        raise MscsError(f"{path}: cannot be written. Check free space and permissions")
