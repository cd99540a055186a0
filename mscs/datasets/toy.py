"""Generated data in a dataset's real layout and label encoding, for the profile without real data.

A picture is the things of a table, painted back to front under a random light. Classes share their colours,
so that a pixel's colour does not tell its class: shape, texture, size and place do. Some classes are rare,
some thin, and some look alike but for their proportions or for what stands beside them.

The readers of this package cannot tell the difference to real data, apart from the marker file
`generated.json`, which records how the tree was made. Every file is a function of the arguments of
`write_dataset` alone, byte for byte.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from mscs.datasets.registry import dataset_spec
from mscs.datasets.spec import GENERATED as MARKER
from mscs.datasets.spec import LabelSet, Spec, Toy
from mscs.errors import MscsError, UsageError
from mscs.locks import locked
from mscs.seeding import numpy_generator

VERSION = 2
SPLITS = ("train", "val")
CONTRAST = 0.5  # of textures, relative to the colour
PERIOD = 1 / 9  # of textures, in picture heights
SUBPIXEL_BITS = 4

Array = np.ndarray

TURNS = 2 * np.pi * np.arange(24) / 24
PRIMITIVES: dict[str, Array] = {  # in a box from (0, 0), lower left, to (1, 1)
    "box": np.array([(0, 0), (1, 0), (1, 1), (0, 1)]),
    "disc": 0.5 + 0.5 * np.stack([np.cos(TURNS), np.sin(TURNS)], axis=1),
    "hill": np.array([(0, 0), (1, 0), (0.5, 1)]),
    "road": np.array([(0, 0), (1, 0), (0.65, 1), (0.35, 1)]),
    "diamond": np.array([(0.5, 0), (1, 0.4), (0.5, 1), (0, 0.4)]),
}
SHAPES = {  # primitives, each with its box: left low right high
    **{name: f"{name} 0 0 1 1" for name in PRIMITIVES},
    "knife": "diamond 0 0 1 0.25, box 0.25 0.15 0.75 1",
    "fork": "box 0 0 0.3 1, box 0.7 0 1 1, box 0 0.3 1 0.45",
    "person": "disc 0.2 0.8 0.8 1, disc 0 0.28 1 0.82, box 0.1 0 0.4 0.5, box 0.6 0 0.9 0.5",
    "rider": "disc 0.35 0.8 0.65 1, disc 0.25 0.28 0.75 0.82, disc 0.02 0 0.42 0.4, disc 0.58 0 0.98 0.4",
    "car": "disc 0.02 0 0.42 0.4, disc 0.58 0 0.98 0.4, box 0 0.15 1 0.65, box 0.15 0.6 0.8 1",
    "table": "box 0 0.65 1 1, box 0 0 0.15 0.7, box 0.85 0 1 0.7",
    "bed": "box 0 0.1 1 0.6, box 0 0 0.12 1",
    "fence": "box 0 0.65 1 0.9, box 0 0.2 1 0.45, box 0.1 0 0.2 1, box 0.45 0 0.55 1, box 0.8 0 0.9 1",
    "cow": "disc 0.05 0.33 0.85 0.97, box 0.12 0 0.32 0.6, box 0.58 0 0.78 0.6, box 0.75 0.6 1 0.95",
    "horse": "disc 0.04 0.37 0.8 0.73, box 0.08 0 0.22 0.5, box 0.62 0 0.76 0.5, box 0.65 0.5 1 1",
}


def _noise(x: Array, y: Array, rng: np.random.Generator) -> Array:
    return rng.normal(size=(int(2 * y.max()) + 2, int(2 * x.max()) + 2))


TEXTURES: dict[str, Callable[[Array, Array, np.random.Generator], Array]] = {  # of positions in periods
    "plain": lambda x, y, rng: np.zeros_like(x),
    "rows": lambda x, y, rng: np.sign(np.sin(2 * np.pi * y)),
    "columns": lambda x, y, rng: np.sign(np.sin(2 * np.pi * x)),
    "checks": lambda x, y, rng: np.sign(np.sin(2 * np.pi * x) * np.sin(2 * np.pi * y)),
    "blobs": lambda x, y, rng: np.sign(cv2.resize(_noise(x, y, rng), x.shape[::-1], None, 0, 0, 2)),
}
COLORS = {  # lowest and highest hue (0-180, and round again), saturation and value (0-255)
    "grey": ((0, 0, 80), (180, 30, 140)),
    "brown": ((0, 10, 70), (22, 90, 150)),
    "blue": ((90, 10, 90), (125, 80, 190)),
    "green": ((35, 90, 80), (75, 160, 150)),
    "paint": ((100, 110, 90), (195, 200, 220)),
    "pink": ((0, 50, 100), (20, 130, 210)),
}


def render(
    toy: Toy, labels: LabelSet, largest: Sequence[int], rng: np.random.Generator
) -> tuple[Array, Array]:
    """Draw one picture: image uint8 (H, W, 3) RGB and raw label values uint8 (H, W)."""
    height, width = (np.array(largest) * rng.uniform(toy.smallest, 1, size=2)).astype(int)
    image, label = np.zeros((height, width, 3)), np.zeros((height, width), np.uint8)
    for (count, *place), parts in things(toy.things):
        for _ in range(rng.integers(int(count[0]), int(count[1]), endpoint=True)):
            length, x, y, turn = (rng.uniform(*bounds) for bounds in place)
            sin, cos, mirror = np.sin(2 * np.pi * turn), np.cos(2 * np.pi * turn), rng.choice([-1, 1])
            # where the thing's unit vectors and its foot lie, in pixels (x, y)
            axes = height * length * np.array([(mirror * cos, mirror * sin), (sin, -cos)])
            foot = (width * x, height * y)
            colors: dict[str, Array] = {}
            for class_name, surface, shape, box in parts:
                mask = _mask(shape, box, axes, foot, label.shape)
                color, texture = surface.split()
                paint = colors.setdefault(class_name, _color(color, rng))
                image[mask] = _surface(paint, texture, label.shape, rng)[mask]
                label[mask] = labels.raw_ids[labels.classes.index(class_name)][0]
    return _lit(image, rng), label


def things(table: str) -> list[tuple[Array, list[tuple[str, str, str, Array]]]]:
    """Parse a table: per thing its numbers' ranges (5, 2), and (class, surface, shape, box) of its parts."""
    found: list[tuple[Array, list[tuple[str, str, str, Array]]]] = []
    for line in table.strip().splitlines():
        *numbers, class_name, surface, shape, box = (cell.strip() for cell in line.split("|"))
        if numbers[0] != "+":
            bounds = [re.findall(r"(?:^-)?[\d.]+", number) for number in numbers]
            found.append((np.array([(low[0], low[-1]) for low in bounds], dtype=float), []))
        found[-1][1].append((class_name, surface, shape, np.array(box.split(), dtype=float)))
    return found


def _mask(shape: str, box: Array, axes: Array, foot: tuple[float, float], size: tuple[int, ...]) -> Array:
    """Return which pixels of a picture of `size` a shape covers that fills `box` of its thing."""
    mask = np.zeros(size, np.uint8)
    for primitive in SHAPES[shape].split(","):
        kind, *inner = primitive.split()
        low, high = np.array(inner, dtype=float).reshape(2, 2)
        outline = box[:2] + (box[2:] - box[:2]) * (low + (high - low) * PRIMITIVES[kind])
        pixels = np.round((outline @ axes + foot) * 2**SUBPIXEL_BITS).astype(np.int32)
        cv2.fillPoly(mask, [pixels], 1, shift=SUBPIXEL_BITS)
    return mask.astype(bool)


def _color(name: str, rng: np.random.Generator) -> Array:
    hsv = rng.uniform(*COLORS[name]) % (180, 256, 256)
    return cv2.cvtColor(hsv.astype(np.uint8)[None, None], cv2.COLOR_HSV2RGB)[0, 0].astype(float)


def _surface(color: Array, texture: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Return a picture (H, W, 3) of nothing but this colour and texture."""
    y, x = (np.indices(shape) + 0.5) / (PERIOD * shape[0] * rng.uniform(0.85, 1.15))
    return color * (1 + CONTRAST * TEXTURES[texture](x, y, rng)[..., None])


def _lit(image: Array, rng: np.random.Generator) -> Array:
    """Return the picture under a light of random strength, tint and slope, with the noise of a sensor."""
    slope = np.linspace(-1, 1, image.shape[1])[:, None] * rng.uniform(-0.1, 0.1)
    light = rng.uniform(0.8, 1.2) * rng.uniform(0.95, 1.05, 3) * (1 + slope)
    return np.clip(np.rint(image * light + rng.normal(0, 4, image.shape)), 0, 255).astype(np.uint8)


def write_dataset(
    name: str | Spec,
    root: Path,
    *,
    seed: int = 0,
    train: int,
    val: int,
    image_size: tuple[int, int] | None = None,
) -> None:
    """Write a generated dataset into the folder `root`; a finished tree with the same arguments is kept.

    Processes that ask for the same tree at once wait for the first one to draw it.

    Args:
        name: one of `DATASETS`, or the facts of another dataset.
        root: the dataset's root folder; appears whole or not at all, and replaces an older generated tree.
        seed: of all pictures.
        train: number of training images.
        val: number of validation images.
        image_size: (H, W), each at least 32; None means the dataset's default (`Toy.size`).

    Raises:
        UsageError: unknown dataset, impossible number or size, or `root` holds what was not generated.
        MscsError: a file cannot be written.
    """
    spec = dataset_spec(name)
    if spec.toy is None:
        raise UsageError(f"{spec.name} has no generated stand-in; use the real dataset (data_source: real)")
    size = image_size or spec.toy.size
    if train < 1 or val < 1 or min(size) < 32:
        raise UsageError(
            f"cannot generate {train} + {val} images of {size} pixels. Accepted: at least 1 image per split, "
            "(height, width) of at least 32 pixels each"
        )
    made = {"dataset": spec.name, "seed": seed, "train": train, "val": val, "image_size": list(size)}
    made["version"] = VERSION
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked(root.parent, waiting=f"waiting for another process that draws into {root.parent}"):
        if not _is_made(root, made):
            _replace_tree(root, spec.toy, spec.labels(), made)


def _is_made(root: Path, made: dict[str, Any]) -> bool:
    """Return whether `root` holds just this tree; what was not generated is left alone, with UsageError."""
    if (root / MARKER).is_file():
        return json.loads((root / MARKER).read_text()) == made
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UsageError(
            f"{root} was not generated (it holds no {MARKER}), so it is left alone. "
            "Name another folder, or remove this one"
        )
    return False


def _replace_tree(root: Path, toy: Toy, labels: LabelSet, made: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as work:
        drawn, name = Path(work, root.name), made["dataset"]
        jobs = [(split, index) for split in SPLITS for index in range(made[split])]
        for split, index in tqdm(jobs, f"draw {name}", unit="image", disable=None):
            rng = numpy_generator(made["seed"], "toy", name, split, index)
            picture, label = render(toy, labels, made["image_size"], rng)
            image_file, label_file = (drawn / file for file in toy.paths(split, index))
            _write(image_file, np.ascontiguousarray(picture[..., ::-1]))
            _write(label_file, label)
            if toy.list_of is not None:
                names = drawn / toy.list_of(split)
                names.parent.mkdir(parents=True, exist_ok=True)
                with names.open("a") as file:
                    file.write(f"{label_file.stem}\n")
        (drawn / MARKER).write_text(json.dumps(made, indent=2) + "\n")
        if root.exists():
            shutil.rmtree(root)
        drawn.rename(root)


def _write(path: Path, pixels: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), pixels):
        raise MscsError(f"{path}: cannot be written. Check free space and permissions")
