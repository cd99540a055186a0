"""What is done once after fetching: convert Pascal-Context labels, decode images to a cache on local disk."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from mscs.datasets.base import CACHE, MANIFEST, decode_image, decode_label, read_bytes
from mscs.datasets.build import INDEXERS
from mscs.datasets.download import require_space
from mscs.datasets.labels import label_set
from mscs.datasets.pascal_context import LABEL_FOLDER, MAT_FOLDER
from mscs.errors import MscsError, UsageError
from mscs.results import atomic_path, read_json, write_json

NPY_HEADER = 128  # bytes


def read_names(path: Path) -> dict[int, str]:
    """Read a list of lines "<number>: <name>"."""
    found = re.findall(r"^\s*(\d+)\s*:\s*(.+?)\s*$", path.read_text(), flags=re.MULTILINE)
    return {int(number): name for number, name in found}


def context_lookup(root: Path) -> np.ndarray:
    """Return uint8 (460,): from the 459 classes of Pascal-Context to 1..59, everything else 0.

    Raises:
        MscsError: the archive's list of names is missing, or lacks one of the 59 classes.
    """
    classes = label_set("pascal_context").classes
    places = (root / "labels.txt", root / MAT_FOLDER / "labels.txt")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise MscsError(
            f"{places[0]}: the list of the 459 class names is missing. Fetch pascal_context again"
        )
    numbers = {name: number for number, name in read_names(path).items()}
    missing = [name for name in classes if name not in numbers]
    if missing:
        raise MscsError(f"{path}: has no class named {', '.join(missing)}. Expected the list of 459 names")
    official = root / "59_labels.txt"
    if official.is_file() and set(read_names(official).values()) != set(classes):
        raise MscsError(f"{official}: lists other classes than the 59 of this package")
    table = np.zeros(max(459, *numbers.values()) + 1, np.uint8)
    for index, name in enumerate(classes, 1):
        table[numbers[name]] = index
    return table


def convert_pascal_context(root: Path, *, progress: bool = True) -> int:
    """Write SegmentationClassContext59 from the .mat files; return how many were converted.

    Interrupted, it goes on where it was; the folder appears when it is complete.
    """
    target = root / LABEL_FOLDER
    if target.is_dir():
        return 0
    if not (root / MAT_FOLDER).is_dir():
        raise UsageError(
            f"pascal_context: no folder {root / MAT_FOLDER}. Run `mscs data fetch pascal_context` first"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UsageError("reading .mat files needs SciPy: pip install 'mscs[data]'") from error
    table = context_lookup(root)
    staging = root / f".{LABEL_FOLDER}"
    staging.mkdir(exist_ok=True)

    def convert(path: Path) -> None:
        out = staging / f"{path.stem}.png"
        if out.exists():
            return
        try:
            raw = loadmat(path)["LabelMap"]
            label = table[raw]
        except Exception as error:  # SciPy raises many kinds on a broken file
            raise MscsError(f"{path}: broken annotation ({error}). Fetch pascal_context again") from error
        with atomic_path(out) as temporary:
            temporary.write_bytes(cv2.imencode(".png", label)[1].tobytes())

    paths = sorted((root / MAT_FOLDER).glob("*.mat"))
    if not paths:
        raise MscsError(f"{root / MAT_FOLDER}: holds no .mat file. Fetch pascal_context again")
    _in_parallel(convert, paths, "converting labels", progress)
    staging.rename(target)
    return len(paths)


def cache_bytes(name: str, root: Path) -> int:
    """Return how many bytes the cache of decoded images will take; reads image headers only."""
    total = 0
    for path, is_label in _files(name, root):
        with Image.open(root / path) as image:
            total += image.width * image.height * (1 if is_label else 3) + NPY_HEADER
    return total


def build_cache(name: str, root: Path, folder: Path | None = None, *, progress: bool = True) -> int:
    """Decode every image and label of the splits to uncompressed .npy files; return their number.

    Every file is compared with the manifest on the way. Readers use the cache as soon as it is complete, and
    refuse it when the manifest has changed. Interrupted, it goes on where it was.

    Args:
        name: dataset.
        root: the dataset's root folder, with a manifest.
        folder: where the files go, e.g. on a fast local disk (linked from the root folder); None means
            `decoded` in the root folder.
        progress: show a bar on stderr.
    """
    manifest = _manifest(name, root)
    sums = {line.split(" ", 2)[2]: line.split(" ", 1)[0] for line in manifest["files"]}
    cache = root / CACHE
    if folder is not None and not cache.exists():
        folder.mkdir(parents=True, exist_ok=True)
        cache.symlink_to(folder.resolve())
    cache.mkdir(exist_ok=True)
    index = cache / "index.json"
    if index.is_file() and read_json(index)["manifest"] != manifest["digest"]:
        _empty(cache)
    files = _files(name, root)
    require_space(cache, cache_bytes(name, root) - sum(path.stat().st_size for path in cache.rglob("*.npy")))

    def decode(file: tuple[str, bool]) -> None:
        path, is_label = file
        out = cache / f"{path}.npy"
        if out.exists():
            return
        data = read_bytes(root / path)
        if hashlib.sha256(data).hexdigest() != sums.get(path):
            raise MscsError(
                f"{root / path}: not the file in {root / MANIFEST}. Run `mscs data verify {name}` again"
            )
        pixels = (decode_label if is_label else decode_image)(data, root / path)
        with atomic_path(out) as temporary, temporary.open("wb") as opened:
            np.save(opened, pixels)

    _in_parallel(decode, files, f"decoding {name}", progress)
    write_json(index, {"dataset": name, "manifest": manifest["digest"], "files": len(files)})
    return len(files)


def _manifest(name: str, root: Path) -> dict[str, Any]:
    if not (root / MANIFEST).is_file():
        raise UsageError(f"{root / MANIFEST}: not there. Run `mscs data verify {name} --root {root}` first")
    return read_json(root / MANIFEST)


def _files(name: str, root: Path) -> list[tuple[str, bool]]:
    """Return path and "is a label" of every file of the splits that are there."""
    files: dict[str, bool] = {}
    for split in _manifest(name, root)["splits"]:
        for entry in INDEXERS[name](label_set(name), split, root).entries:
            files |= {entry.image: False, entry.label: True}
    return sorted(files.items())


def _empty(cache: Path) -> None:
    """Remove what a cache of other files holds, its index first."""
    (cache / "index.json").unlink()
    for path in cache.iterdir():
        shutil.rmtree(path)


def _in_parallel(work: Callable[[Any], None], items: Sequence[Any], text: str, progress: bool) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(work, item) for item in items]
        try:
            quiet = None if progress else True  # None: no bar where the output is no terminal
            for job in tqdm(as_completed(jobs), total=len(jobs), desc=text, disable=quiet):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
