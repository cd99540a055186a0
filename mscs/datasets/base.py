"""What every dataset is: a list of image and label files, one label table, and a way to read a sample."""

import dataclasses
import functools
import importlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from mscs.datasets.labels import IGNORE_INDEX, LabelSet
from mscs.errors import MscsError, UsageError
from mscs.results import read_json

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
JPEG_TRAILER = 4096  # bytes at the end of a file within which the end mark must lie
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_FORMAT = slice(24, 26)  # header bytes: bit depth, colour type
PNG_GREY, PNG_RGB = bytes([8, 0]), bytes([8, 2])
MANIFEST = "manifest.json"
CACHE = "decoded"


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its label.

    image: uint8 (H, W, 3), RGB; label: uint8 (H, W), training ids, 255 = ignored; id: unique in the dataset.
    """

    image: np.ndarray
    label: np.ndarray
    id: str


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one sample lies, relative to the dataset's root folder."""

    id: str
    image: str
    label: str


@dataclass(frozen=True)
class Index:
    """The samples of one split, and the lookup table from label files to training ids (256 bytes)."""

    entries: list[Entry]
    lookup: bytes
    known_raw_values: frozenset[int]


class Dataset:
    """A split of one dataset; `dataset[i]` reads, decodes and maps sample i."""

    ignore_index = IGNORE_INDEX

    def __init__(self, labels: LabelSet, split: str, root: Path, index: Index) -> None:
        self.labels = labels
        self.name = labels.dataset
        self.task = labels.task
        self.split = split
        self.root = root
        self.num_classes = labels.num_classes
        self.classes = labels.classes
        self.colors = np.array(labels.colors, dtype=np.uint8)
        self.class_weights = labels.class_weights
        self.entries = index.entries
        self.ids = tuple(entry.id for entry in index.entries)
        self.known_raw_values = index.known_raw_values
        self._lookup = np.frombuffer(index.lookup, dtype=np.uint8)
        self._cache = open_cache(root)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Sample:
        entry = self.entries[i]
        image, label = self._read_cached(entry) if self._cache else self._read(entry)
        return Sample(image, cv2.LUT(label, self._lookup), entry.id)

    def _read(self, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
        image_path, label_path = self.root / entry.image, self.root / entry.label
        image = decode_image(read_bytes(image_path), image_path)
        label = decode_label(read_bytes(label_path), label_path)
        check_sizes(image, label, label_path)
        return image, label

    def _read_cached(self, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
        """Map the decoded files into memory: only the pages that a crop touches are read."""
        image, label = (
            np.load(f"{self._cache}/{path}.npy", mmap_mode="r") for path in (entry.image, entry.label)
        )
        return image.view(np.ndarray), label.view(np.ndarray)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file of the dataset."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise MscsError(
            f"{path}: cannot be read ({error.strerror}). `mscs data verify` lists all that is wrong"
        ) from error


def decode_image(data: bytes, path: Path) -> np.ndarray:
    """Decode a colour image to uint8 (H, W, 3) RGB, as its pixels are stored (no rotation by EXIF)."""
    return _decode(data, path, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def decode_label(data: bytes, path: Path) -> np.ndarray:
    """Decode a label file to the raw uint8 values (H, W) that it holds."""
    label = _decode(data, path, cv2.IMREAD_UNCHANGED)
    if label.ndim == 3:
        # OpenCV expands a palette to its colours; the class ids are the palette's indices.
        with Image.open(io.BytesIO(data)) as file:
            if file.mode != "P":
                raise MscsError(f"{path}: label is a {file.mode} image; expected 8-bit class ids")
            label = np.asarray(file)
    if label.dtype != np.uint8:
        raise MscsError(f"{path}: label holds {label.dtype} values; expected 8-bit class ids")
    return label


def _decode(data: bytes, path: Path, flags: int) -> np.ndarray:
    wanted = PNG_GREY if flags == cv2.IMREAD_UNCHANGED else PNG_RGB
    if data.startswith(PNG_START) and data[PNG_FORMAT] == wanted:
        image = _fast_png(data)
        if image is not None:
            return image
    # libjpeg fills what is missing of a cut-off file with grey and only warns.
    cut_off = data.startswith(JPEG_START) and JPEG_END not in data[-JPEG_TRAILER:]
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data and not cut_off else None
    if image is None:
        raise MscsError(f"{path}: cannot be decoded (broken or cut off). Fetch the dataset again")
    return image


def _fast_png(data: bytes) -> np.ndarray | None:
    """Decode a PNG with imagecodecs, if that is installed: it takes about 0.6 of OpenCV's time."""
    codecs = _imagecodecs()
    if codecs is None:
        return None
    try:
        return codecs.png_decode(data)
    except codecs.PngError:
        return None  # OpenCV's verdict decides


@functools.cache
def _imagecodecs() -> Any:
    try:
        return importlib.import_module("imagecodecs")
    except ImportError:
        return None


def check_sizes(image: np.ndarray, label: np.ndarray, path: Path) -> None:
    """Raise MscsError unless image and label have the same height and width."""
    if image.shape[:2] != label.shape:
        raise MscsError(
            f"{path}: label is {label.shape[1]}x{label.shape[0]} pixels, "
            f"its image {image.shape[1]}x{image.shape[0]}. Fetch the dataset again"
        )


def open_cache(root: Path) -> Path | None:
    """Return the folder of decoded images if `mscs data prepare --cache` made one for the files in `root`."""
    index = root / CACHE / "index.json"
    if not index.is_file():
        return None
    made_from, now = read_json(index)["manifest"], read_json(root / MANIFEST)["digest"]
    if made_from != now:
        raise UsageError(
            f"{index.parent}: decoded from other files ({made_from[:12]}) than {root / MANIFEST} lists "
            f"({now[:12]}). Remove that folder, or build it again with `mscs data prepare --cache`"
        )
    return index.parent


def require_folder(dataset: str, folder: Path) -> Path:
    """Return `folder`, or raise UsageError saying how to get the dataset."""
    if not folder.is_dir():
        raise UsageError(
            f"{dataset}: no folder {folder}. Get the real dataset with `mscs data fetch {dataset}`, "
            f"or generated scenes in the same layout with `mscs data synth {dataset}` "
            "(both take --root; the default is $MSCS_DATA/<name>, else data/<name>)"
        )
    return folder


def names_in(folder: Path, suffix: str) -> list[str]:
    """Return the sorted names of the files in `folder` that end in `suffix`, without the suffix."""
    with os.scandir(folder) as files:
        return sorted(file.name.removesuffix(suffix) for file in files if file.name.endswith(suffix))


def pair(
    dataset: str, root: Path, images: Sequence[str], labels: Sequence[str], ids: Sequence[str]
) -> list[Entry]:
    """Return the entries; raise MscsError if a folder is empty or a label file is missing."""
    existing: dict[str, set[str]] = {}
    entries = []
    for image, label, name in zip(images, labels, ids, strict=True):
        folder, file = os.path.split(label)
        if folder not in existing:
            existing[folder] = set(os.listdir(require_folder(dataset, root / folder)))
        if file not in existing[folder]:
            raise MscsError(f"{root / image} has no label: {root / label} is missing. Fetch {dataset} again")
        entries.append(Entry(name, image, label))
    if not entries:
        raise MscsError(f"{dataset}: found no images under {root}. Fetch the dataset again")
    return entries


def index_of(labels: LabelSet, entries: list[Entry]) -> Index:
    """Return the index of a dataset whose label files hold the raw values of its label table."""
    return Index(entries, labels.lookup(), labels.known_raw_values())


def identity_index(labels: LabelSet, entries: list[Entry]) -> Index:
    """Return the index of a dataset whose label files already hold training ids."""
    ids = range(labels.num_classes)
    identity = dataclasses.replace(labels, raw_ids=tuple((i,) for i in ids), ignored_raw_ids=(IGNORE_INDEX,))
    return index_of(identity, entries)


Indexer = Callable[..., Index]
