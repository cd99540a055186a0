"""Is a dataset complete and sound? Decodes every image, and writes down what was found as a manifest.

The manifest lists every image and label file with size and SHA-256. Its digest stands for the data in every
result, and in the pipeline the manifest is what stages depend on, never the image folders.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mscs.datasets.base import (
    MANIFEST,
    Dataset,
    build_dataset,
    check_sizes,
    decode_image,
    decode_label,
    read_bytes,
)
from mscs.datasets.parallel import in_parallel
from mscs.datasets.registry import dataset_spec
from mscs.datasets.spec import GENERATED, Entry
from mscs.errors import MscsError, UsageError
from mscs.results import read_json, write_json

SHOWN_PROBLEMS = 20


def verify(name: str, root: Path, *, workers: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Check counts, decode every image and label, compare sizes, look for unknown label values.

    Args:
        name: one of `DATASETS`.
        root: the dataset's root folder; `manifest.json` is written into it if the folder can be written to.
        workers: threads; None means one per core.
        progress: show a bar on stderr.

    Returns:
        The manifest: dataset, generated (bool), splits (name to count), digest, files ("<sha256> <size>
        <path>").

    Raises:
        UsageError: unknown dataset, or nothing of it in `root`.
        MscsError: something is wrong with it; every problem is named, up to `SHOWN_PROBLEMS`.
    """
    marker = root / GENERATED
    generated = read_json(marker) if marker.is_file() else None
    expected = dataset_spec(name).splits
    if generated:
        expected = {split: generated[split] for split in expected if split in generated}
    datasets: list[Dataset] = []
    problems: list[str] = []
    for split, count in expected.items():
        try:
            datasets.append(build_dataset(name, split, root))
            if len(datasets[-1]) != count:
                problems.append(f"split {split}: {len(datasets[-1])} images, expected {count}")
        except MscsError as error:
            problems.append(f"split {split}: {error}")
    if not datasets:
        raise UsageError("\n  ".join([f"{name}: no split can be read", *problems]))
    entries = [(dataset, entry) for dataset in datasets for entry in dataset.entries]
    files: dict[str, str] = {}
    for lines, found in in_parallel(_check, entries, f"verifying {name}", workers=workers, progress=progress):
        files |= lines
        problems += found
    if not generated:
        changed = (path for path in dataset_spec(name).changed_files(root) if path in files)
        problems += [f"{root / path}: not the official file (SHA-256)" for path in changed]
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        rest = [f"... and {more} more"] if more > 0 else []
        raise MscsError("\n  ".join([f"{name}: {len(problems)} problems", *problems[:SHOWN_PROBLEMS], *rest]))
    listing = [files[path] for path in sorted(files)]
    manifest = {
        "dataset": name,
        "generated": generated is not None,
        "splits": {dataset.split: len(dataset) for dataset in datasets},
        "digest": _digest(listing),
        "files": listing,
    }
    if os.access(root, os.W_OK):  # data may be mounted read-only
        write_json(root / MANIFEST, manifest)
    return manifest


def _check(item: tuple[Dataset, Entry]) -> tuple[dict[str, str], list[str]]:
    """Return the manifest lines of a sample's files by path, and what is wrong with them."""
    dataset, entry = item
    lines, decoded, problems = {}, [], []
    for path, decode in ((entry.image, decode_image), (entry.label, decode_label)):
        try:
            data = read_bytes(dataset.root / path)
            lines[path] = f"{hashlib.sha256(data).hexdigest()} {len(data)} {path}"
            decoded.append(decode(data, dataset.root / path))
        except MscsError as error:
            problems.append(str(error))
    if len(decoded) == 2:
        image, label = decoded
        try:
            check_sizes(image, label, dataset.root / entry.label)
        except MscsError as error:
            problems.append(str(error))
        counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()
        unknown = sorted({*np.flatnonzero(counts).tolist()} - dataset.known_raw_values)
        if unknown:
            problems.append(f"{dataset.root / entry.label}: unknown label values {unknown}")
    return lines, problems


def read_manifest(name: str, root: Path) -> dict[str, Any]:
    """Return the manifest in `root`; UsageError if there is none, MscsError if it is damaged."""
    path = root / MANIFEST
    again = f"Run `mscs data verify {name} --root {root}`"
    if not path.is_file():
        raise UsageError(f"{path}: not there. {again} first")
    found = read_json(path)
    try:
        sound = found["dataset"] == name and found["digest"] == _digest(found["files"])
        sound = sound and bool(found["splits"]) and found["generated"] in (True, False)
        sound = sound and all(int(line.split(" ", 2)[1]) and line.split(" ", 2)[2] for line in found["files"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        sound = False
    if not sound:
        raise MscsError(f"{path}: damaged, or of another dataset than {name}. {again}")
    return found


def check_manifest(name: str, root: Path) -> str:
    """Compare the files in `root` with its manifest, by name and size; return the manifest's digest.

    Fast enough to run before every training: no image is read.

    Raises:
        UsageError: no manifest.
        MscsError: files are missing, were added, or have another size.
    """
    manifest = read_manifest(name, root)
    sizes = {path: int(size) for _, size, path in (line.split(" ", 2) for line in manifest["files"])}
    entries = [entry for s in manifest["splits"] for entry in dataset_spec(name).open_index(s, root).entries]
    listed = {path for entry in entries for path in (entry.image, entry.label)}
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
            f"again, or run `mscs data verify {name} --root {root}` if it was changed on purpose"
        )
    return manifest["digest"]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
