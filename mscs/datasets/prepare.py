"""Decode the images of a dataset once, to a cache of uncompressed files on local disk."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
from tqdm.contrib.concurrent import thread_map

from mscs.datasets.archive import require_space
from mscs.datasets.base import CACHE, Dataset, build_dataset, image_size
from mscs.datasets.registry import dataset_spec
from mscs.datasets.spec import Entry, Spec
from mscs.datasets.verify import listed_files, read_manifest
from mscs.errors import MscsError
from mscs.results import atomic_path

NPY_HEADER = 128  # bytes


def cache_bytes(name: str | Spec, root: Path) -> int:
    """Return how many bytes the cache of decoded images will take."""
    total = 0
    for path, is_label in listed_files(name, root, read_manifest(name, root)["splits"]).items():
        width, height = image_size(root / path)
        total += width * height * (1 if is_label else 3) + NPY_HEADER
    return total


def build_cache(name: str | Spec, root: Path, folder: Path | None = None) -> int:
    """Decode every image and label of the splits to uncompressed .npy files; return their number.

    Every file is compared with the manifest on the way. Readers use the cache as soon as it is complete, and
    refuse it when the manifest has changed. Interrupted, it goes on where it was.

    Args:
        name: one of `DATASETS`, or the facts of another dataset.
        root: the dataset's root folder, with a manifest.
        folder: where the files go, e.g. on a fast local disk (linked from the root folder); None means
            `decoded` in the root folder.
    """
    spec, manifest = dataset_spec(name), read_manifest(name, root)
    sums = {line.split(" ", 2)[2]: line.split(" ", 1)[0] for line in manifest["files"]}
    cache = root / CACHE
    if folder is not None and not cache.exists():
        folder.mkdir(parents=True, exist_ok=True)
        cache.symlink_to(folder.resolve())
    complete, unfinished = cache / manifest["digest"], cache / f".{manifest['digest']}"
    for other in cache.iterdir() if cache.exists() else ():
        if other not in (complete, unfinished):
            shutil.rmtree(other)
    if complete.exists():
        return len(sums)
    unfinished.mkdir(parents=True, exist_ok=True)
    done = sum(path.stat().st_size for path in unfinished.rglob("*.npy"))
    require_space(cache, cache_bytes(name, root) - done)

    def decode(dataset: Dataset, entry: Entry) -> None:
        outs = [unfinished / f"{path}.npy" for path in (entry.image, entry.label)]
        if all(out.exists() for out in outs):
            return
        files = dataset.read_files(entry)
        for path, data in zip((entry.image, entry.label), files, strict=True):
            if hashlib.sha256(data).hexdigest() != sums.get(path):
                raise MscsError(
                    f"{root / path}: not the file in its manifest. Run `mscs data verify {spec.name}` again"
                )
        for out, pixels in zip(outs, dataset.decode(entry, *files), strict=True):
            with atomic_path(out) as temporary, temporary.open("wb") as opened:
                np.save(opened, pixels)

    datasets = [build_dataset(spec, split, root) for split in manifest["splits"]]
    samples = [(dataset, entry) for dataset in datasets for entry in dataset.entries]
    thread_map(decode, *zip(*samples, strict=True), desc=f"decoding {spec.name}", disable=None)
    unfinished.rename(complete)
    return len(sums)
