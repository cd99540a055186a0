"""Read a split of a dataset: `build_dataset` -> `Dataset`, whose items are `Sample`s."""

import contextlib
import io
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from mscs.datasets.registry import dataset_spec
from mscs.datasets.spec import IGNORE_INDEX, Entry, Index, LabelSet, Spec
from mscs.errors import MscsError, UsageError
from mscs.results import read_mapping

try:
    import imagecodecs
except ImportError:
    imagecodecs = None  # type: ignore[assignment]

MAX_PIXELS = 1 << 26
"""Of one image, twice the largest in the four datasets; a header that claims more is taken for broken."""
JPEG_END = b"\xff\xd9"
JPEG_TRAILER = 4096  # bytes at the end of a file within which the end mark must lie
MANIFEST = "manifest.json"
CACHE = "decoded"
"""Folder of decoded images: in a folder named by the digest of the manifest that they were made from."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its label.

    image: uint8 (H, W, 3), RGB; label: uint8 (H, W), training ids, 255 = ignored; id: unique in the dataset.
    """

    image: np.ndarray
    label: np.ndarray
    id: str


class Dataset:
    """A split of one dataset; `dataset[i]` reads, decodes and maps sample i."""

    ignore_index = IGNORE_INDEX

    def __init__(self, labels: LabelSet, split: str, root: Path, index: Index) -> None:
        self.labels = labels
        self.name = labels.dataset
        self.split = split
        self.root = root
        self.num_classes = labels.num_classes
        self.classes = labels.classes
        self.colors = np.array(labels.colors, dtype=np.uint8)
        self.class_weights = labels.class_weights
        self.entries = index.entries
        self.ids = tuple(entry.id for entry in index.entries)
        self.known_raw_values = index.labels.known_raw_values()
        self._lookup = np.frombuffer(index.labels.lookup(), dtype=np.uint8)
        self._cache = open_cache(root)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Sample:
        entry = self.entries[i]
        if self._cache:
            image, label = self._map_decoded(entry.image), self._map_decoded(entry.label)
        else:
            image, label = self.decode(entry, *self.read_files(entry))
        return Sample(image, cv2.LUT(label, self._lookup), entry.id)

    def read_files(self, entry: Entry) -> tuple[bytes, bytes]:
        """Return the content of the image and the label file."""
        return read_bytes(self.root / entry.image), read_bytes(self.root / entry.label)

    def decode(self, entry: Entry, image_file: bytes, label_file: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Return the image and the raw label values, decoded; MscsError if one is broken."""
        image = decode_image(image_file, self.root / entry.image)
        label = decode_label(label_file, self.root / entry.label)
        if image.shape[:2] != label.shape:
            raise MscsError(
                f"{self.root / entry.label}: label is {label.shape[1]}x{label.shape[0]} pixels, "
                f"its image {image.shape[1]}x{image.shape[0]}. Fetch the dataset again"
            )
        return image, label

    def _map_decoded(self, path: str) -> np.ndarray:
        """Map a decoded file into memory: only the pages that a crop touches are read."""
        file = f"{self._cache}/{path}.npy"
        try:
            return np.load(file, mmap_mode="r").view(np.ndarray)
        except (OSError, ValueError) as error:
            raise MscsError(f"{file}: damaged ({error}). Remove {self._cache}") from error


def build_dataset(
    name: str | Spec, split: str, root: str | PathLike[str], task: int | None = None, **options: Any
) -> Dataset:
    """Open a split of a dataset.

    Args:
        name: one of `DATASETS`, or the facts of another dataset.
        split: train, val or (cityscapes, cadis) test.
        root: folder of this dataset, in the layout that its module describes.
        task: CaDIS only: 1, 2 or 3 (the default).
        options: of the dataset's `index` function (cadis: exclude_blacklisted).

    Raises:
        UsageError: unknown name, split, task or option; missing folder.
        MscsError: empty folder, image without label.
    """
    spec, root = dataset_spec(name), Path(root)
    index = spec.open_index(split, root, task, **options)
    return Dataset(spec.labels(task), split, root, index)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file of the dataset."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise MscsError(
            f"{path}: cannot be read ({error.strerror}). `mscs data verify` lists all that is wrong"
        ) from error


def decode_image(data: bytes, path: Path) -> np.ndarray:
    """Decode an image file to uint8 (H, W, 3), RGB, as its pixels are stored: no rotation by EXIF."""
    return _decode(data, path, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def decode_label(data: bytes, path: Path) -> np.ndarray:
    """Decode a label file to the raw uint8 values (H, W) that it holds."""
    label = _decode(data, path, cv2.IMREAD_UNCHANGED)
    if label.ndim != 2 or label.dtype != np.uint8:
        shape = "x".join(map(str, label.shape))
        raise MscsError(f"{path}: label is {shape} of {label.dtype}; expected 8-bit class ids")
    return label


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) from the header of an image; MscsError if it is none or claims too much."""
    return _open(read_bytes(path), path).size


def _open(data: bytes, path: Path) -> Image.Image:
    """Return the image undecoded."""
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow raises many kinds on a broken file
        raise _broken(path, str(error) if "pixels" in str(error) else "") from error
    if image.width * image.height > MAX_PIXELS:
        raise _broken(path, f"its header claims {image.width}x{image.height} pixels")
    return image


def _broken(path: Path, why: str = "") -> MscsError:
    return MscsError(f"{path}: cannot be decoded ({why or 'broken or cut off'}). Get that file again")


def _decode(data: bytes, path: Path, flags: int) -> np.ndarray:
    header, is_label = _open(data, path), flags == cv2.IMREAD_UNCHANGED
    # libjpeg fills what is missing of a cut-off file with grey and only warns.
    if header.format == "JPEG" and JPEG_END not in data[-JPEG_TRAILER:]:
        raise _broken(path)
    try:
        if is_label and (header.mode == "P" or "transparency" in header.info):
            # OpenCV expands a palette to its colours; the class ids are the palette's indices.
            return np.asarray(header)
        if imagecodecs and header.format == "PNG" and "transparency" not in header.info:
            with contextlib.suppress(RuntimeError):  # OpenCV converts and judges what this does not read
                fast = imagecodecs.png_decode(data)  # in about 0.6 of OpenCV's time
                if fast.dtype == np.uint8 and fast.shape[2:] == (() if is_label else (3,)):
                    return fast
        image: np.ndarray | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (cv2.error, OSError, ValueError, SyntaxError, MemoryError) as error:
        raise _broken(path) from error
    if image is None:
        raise _broken(path)
    return image


def open_cache(root: Path) -> Path | None:
    """Return the folder of decoded images if `mscs data prepare --cache` made one for the files in `root`."""
    made_from = [path.name for path in (root / CACHE).glob("[!.]*")]
    if not made_from:
        return None
    digest = str(read_mapping(root / MANIFEST).get("digest"))
    if digest not in made_from:
        raise UsageError(
            f"{root / CACHE}: decoded from other files ({made_from[0][:12]}) than {root / MANIFEST} lists "
            f"({digest[:12]}). Remove that folder, or build it again with `mscs data prepare --cache`"
        )
    return root / CACHE / digest
