"""Is a dataset complete and sound? Decodes every image, and writes down what was found as a manifest.

The manifest lists every image and label file with size and SHA-256. Its digest stands for the data in every
result, and in the pipeline the manifest is what stages depend on, never the image folders.
"""

import hashlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.contrib.concurrent import thread_map

from mscs.datasets.base import MANIFEST, Dataset, build_dataset
from mscs.datasets.registry import dataset_spec
from mscs.datasets.spec import GENERATED, Entry, Spec
from mscs.errors import MscsError, UsageError
from mscs.results import read_json, read_mapping, write_json

SHOWN_PROBLEMS = 20


def verify(
    name: str | Spec, root: Path, *, official: bool = True, needed: Collection[str] | None = None
) -> dict[str, Any]:
    """Check counts, decode every image and label, compare sizes, look for unknown label values.

    Args:
        name: one of `DATASETS`, or the facts of another dataset.
        root: the dataset's root folder; `manifest.json` is written into it if the folder can be written to.
        official: compare with the published digests of files, where there are any; not for files that hold
            the same pixels in another encoding.
        needed: splits that must be there; others are checked where they are. None: all.

    Returns:
        The manifest: dataset, generated (bool), splits (name to count), digest, files ("<sha256> <size>
        <path>").

    Raises:
        UsageError: unknown dataset, or nothing of it in `root`.
        MscsError: something is wrong with it; problems are named, one per sample, up to `SHOWN_PROBLEMS`.
    """
    spec, marker = dataset_spec(name), root / GENERATED
    name, expected = spec.name, spec.splits
    generated = marker.is_file()
    if generated:
        made = read_mapping(marker)
        expected = {split: made[split] for split in expected if split in made}
    datasets: list[Dataset] = []
    problems: list[str] = []
    for split, count in expected.items():
        try:
            datasets.append(build_dataset(spec, split, root))
            if count not in (None, len(datasets[-1])):
                problems.append(f"split {split}: {len(datasets[-1])} images, expected {count}")
        except MscsError as error:
            if needed is None or split in needed or not isinstance(error, UsageError):
                problems.append(f"split {split}: {error}")
    if not datasets:
        raise UsageError("\n  ".join([f"{name}: no split can be read", *problems]))
    samples = [(dataset, entry) for dataset in datasets for entry in dataset.entries]
    checked = thread_map(_check, *zip(*samples, strict=True), desc=f"verifying {name}", disable=None)
    problems += [found for found in checked if isinstance(found, str)]
    files = {path: line for found in checked if isinstance(found, dict) for path, line in found.items()}
    if official and not generated:
        changed = (path for path in spec.changed_files(root) if path in files)
        problems += [f"{root / path}: not the official file (SHA-256)" for path in changed]
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        rest = [f"... and {more} more"] if more > 0 else []
        raise MscsError("\n  ".join([f"{name}: {len(problems)} problems", *problems[:SHOWN_PROBLEMS], *rest]))
    listing = [files[path] for path in sorted(files)]
    manifest = {
        "dataset": name,
        "generated": generated,
        "splits": {dataset.split: len(dataset) for dataset in datasets},
        "digest": _digest(listing),
        "files": listing,
    }
    if os.access(root, os.W_OK):  # data may be mounted read-only
        write_json(root / MANIFEST, manifest)
    return manifest


def _check(dataset: Dataset, entry: Entry) -> dict[str, str] | str:
    """Return the manifest lines of a sample's files by path, or what is wrong with them."""
    try:
        files = dataset.read_files(entry)
        _, label = dataset.decode(entry, *files)
    except MscsError as error:
        return str(error)
    unknown = {*np.flatnonzero(np.bincount(label.ravel())).tolist()} - dataset.known_raw_values
    if unknown:
        return f"{dataset.root / entry.label}: unknown label values {sorted(unknown)}"
    return {
        path: f"{hashlib.sha256(data).hexdigest()} {len(data)} {path}"
        for path, data in zip((entry.image, entry.label), files, strict=True)
    }


def read_manifest(name: str | Spec, root: Path) -> dict[str, Any]:
    """Return the manifest in `root`; UsageError if there is none, MscsError if it is damaged."""
    path, name = root / MANIFEST, dataset_spec(name).name
    again = f"Run `mscs data verify {name} --root {root}`"
    if not path.is_file():
        raise UsageError(f"{path}: not there. {again} first")
    found = read_json(path)
    try:
        sound = found["dataset"] == name and found["digest"] == _digest(found["files"])
        sound = sound and bool(found["splits"]) and found["generated"] in (True, False)
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise MscsError(f"{path}: damaged, or of another dataset than {name}. {again}")
    return found


def listed_files(name: str | Spec, root: Path, splits: Iterable[str]) -> dict[str, bool]:
    """Return the image and label files of the splits, sorted, with "is a label"."""
    files: dict[str, bool] = {}
    for split in splits:
        for entry in dataset_spec(name).open_index(split, root).entries:
            files |= {entry.image: False, entry.label: True}
    return dict(sorted(files.items()))


def check_manifest(name: str | Spec, root: Path) -> str:
    """Compare the files in `root` with its manifest, by name and size; return the manifest's digest.

    Fast enough to run before every training: no image is read.

    Raises:
        UsageError: no manifest.
        MscsError: files are missing, were added, or have another size.
    """
    manifest = read_manifest(name, root)
    again = f"mscs data verify {manifest['dataset']} --root {root}"
    sizes = {path: int(size) for _, size, path in (line.split(" ", 2) for line in manifest["files"])}
    listed = listed_files(name, root, manifest["splits"]).keys()
    problems = []
    for path, size in sizes.items():
        actual = (root / path).stat().st_size if (root / path).is_file() else None
        if actual != size:
            problems.append(f"{path}: {'missing' if actual is None else f'{actual} bytes, not {size}'}")
    problems += [f"{path}: not in the manifest" for path in sorted(listed - sizes.keys())]
    problems += [f"{path}: in the manifest, but in no split" for path in sorted(sizes.keys() - listed)]
    if problems:
        raise MscsError(
            f"{root}: {len(problems)} files do not fit {MANIFEST}, such as {problems[0]}. Fetch the dataset "
            f"again, or run `{again}` if it was changed on purpose"
        )
    return manifest["digest"]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
