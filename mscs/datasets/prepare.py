"""Decode the images of a dataset once, to a cache of uncompressed files on local disk."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mscs.datasets.archive import require_space
from mscs.datasets.base import CACHE, decode_image, decode_label, image_size, read_bytes, text_in
from mscs.datasets.parallel import in_parallel
from mscs.datasets.registry import dataset_spec
from mscs.datasets.verify import read_manifest
from mscs.errors import MscsError
from mscs.results import atomic_path, write_json

NPY_HEADER = 128  # bytes


def cache_bytes(name: str, root: Path) -> int:
    """Return how many bytes the cache of decoded images will take."""
    total = 0
    for path, is_label in _files(name, root, read_manifest(name, root)):
        width, height = image_size(read_bytes(root / path), root / path)
        total += width * height * (1 if is_label else 3) + NPY_HEADER
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
    manifest = read_manifest(name, root)
    sums = {line.split(" ", 2)[2]: line.split(" ", 1)[0] for line in manifest["files"]}
    cache = root / CACHE
    if folder is not None and not cache.exists():
        folder.mkdir(parents=True, exist_ok=True)
        cache.symlink_to(folder.resolve())
    cache.mkdir(exist_ok=True)
    index = cache / "index.json"
    if index.is_file() and text_in(index, "manifest") != manifest["digest"]:
        index.unlink()
        for path in cache.iterdir():
            shutil.rmtree(path)
    files = _files(name, root, manifest)
    require_space(cache, cache_bytes(name, root) - sum(path.stat().st_size for path in cache.rglob("*.npy")))

    def decode(file: tuple[str, bool]) -> None:
        path, is_label = file
        out = cache / f"{path}.npy"
        if out.exists():
            return
        data = read_bytes(root / path)
        if hashlib.sha256(data).hexdigest() != sums.get(path):
            raise MscsError(
                f"{root / path}: not the file in its manifest. Run `mscs data verify {name}` again"
            )
        pixels = (decode_label if is_label else decode_image)(data, root / path)
        with atomic_path(out) as temporary, temporary.open("wb") as opened:
            np.save(opened, pixels)

    for _ in in_parallel(decode, files, f"decoding {name}", workers=None, progress=progress):
        pass
    write_json(index, {"dataset": name, "manifest": manifest["digest"], "files": len(files)})
    return len(files)


def _files(name: str, root: Path, manifest: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return path and "is a label" of every file of the splits that are there."""
    files: dict[str, bool] = {}
    for split in manifest["splits"]:
        for entry in dataset_spec(name).open_index(split, root).entries:
            files |= {entry.image: False, entry.label: True}
    return sorted(files.items())
