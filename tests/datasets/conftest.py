"""Small dataset trees in the real on-disk layouts, with random pixels and every raw label value."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mscs.datasets import DATASETS, label_set
from mscs.datasets.cadis import VIDEOS
from mscs.results import file_sha256

SIZE = (24, 40)
Paths = list[tuple[str, str]]


def tree_paths(name: str, split: str, count: int) -> Paths:
    """Image and label path of each sample, in the order of the reader."""
    if name == "cityscapes":
        stems = sorted(f"{city}/{city}_00000{i}_000019" for city in ("aachen", "bonn") for i in range(count))
        stems = stems[:count]
        return [
            (f"leftImg8bit/{split}/{s}_leftImg8bit.png", f"gtFine/{split}/{s}_gtFine_labelIds.png")
            for s in stems
        ]
    if name == "ade20k":
        folder = {"train": "training", "val": "validation"}[split]
        base = "ADEChallengeData2016"
        stems = [f"ADE_{split}_{i:08d}" for i in range(1, count + 1)]
        return [(f"{base}/images/{folder}/{s}.jpg", f"{base}/annotations/{folder}/{s}.png") for s in stems]
    if name == "pascal_context":
        stems = [f"2008_{split}{i:06d}" for i in range(count)]
        return [
            (f"VOCdevkit/VOC2010/JPEGImages/{s}.jpg", f"SegmentationClassContext59/{s}.png") for s in stems
        ]
    if name == "camvid":
        return [(f"{split}/0001TP_{i:06d}.png", f"{split}annot/0001TP_{i:06d}.png") for i in range(count)]
    videos = VIDEOS[split]
    stems = [
        (videos[i % len(videos)], f"Video{videos[i % len(videos)]}_frame{i:06d}.png") for i in range(count)
    ]
    return [(f"Video{v:02d}/Images/{file}", f"Video{v:02d}/Labels/{file}") for v, file in sorted(stems)]


def raw_label(name: str, rng: np.random.Generator) -> np.ndarray:
    """Random raw values; every value that the dataset knows occurs."""
    known = np.array(sorted(label_set(name).known_raw_values()), np.uint8)
    label = rng.choice(known, SIZE)
    label.flat[: len(known)] = known
    return label


def write_file(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., Path]:
    """`make_tree(name, splits={"train": 3})` writes a tree and returns its root."""

    def make(name: str, splits: dict[str, int] | None = None) -> Path:
        root = tmp_path / name
        rng = np.random.default_rng(7)
        for split, count in (splits or {"train": 3, "val": 2}).items():
            paths = tree_paths(name, split, count)
            for image, label in paths:
                smooth = cv2.resize(rng.integers(0, 256, (6, 10, 3), np.uint8), SIZE[::-1])
                write_file(root / image, smooth)
                write_file(root / label, raw_label(name, rng))
            if name == "pascal_context":
                lists = root / "VOCdevkit/VOC2010/ImageSets/Main"
                lists.mkdir(parents=True, exist_ok=True)
                (lists / f"{split}.txt").write_text("".join(f"{Path(image).stem}\n" for image, _ in paths))
        return root

    return make


@pytest.fixture
def small(make_tree, monkeypatch):
    """`small(name)` writes a tree that counts as complete: the published numbers become those of the tree."""

    def make(name: str) -> Path:
        spec = DATASETS[name]
        splits = {"train": 3, "val": 2, "test": 1}
        root = make_tree(name, {split: splits[split] for split in spec.splits})
        parts = tuple(
            dataclasses.replace(part, files={glob: len(list(root.glob(glob))) or 1 for glob in part.files})
            for part in spec.parts
        )
        counts = {split: splits[split] for split in spec.splits}
        changes: dict[str, Any] = {"splits": counts, "parts": parts}
        if spec.digests:
            files = sorted(path for path in root.rglob("*.png"))
            lines = (f"{file_sha256(path)}  {path.relative_to(root)}\n" for path in files)
            changes["digests"] = root.with_suffix(".sha256")
            changes["digests"].write_text("".join(lines))
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(spec, **changes))
        return root

    return make
