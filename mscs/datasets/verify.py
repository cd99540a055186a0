"""Is a dataset complete and sound? Decodes every image, and writes down what was found as a manifest.

The manifest lists every image and label file with size and SHA-256. Its digest stands for the data in every
result, and in the pipeline the manifest is what stages depend on, never the image folders.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from mscs.datasets.base import MANIFEST, Dataset, Entry, check_sizes, decode_image, decode_label, read_bytes
from mscs.datasets.build import build_dataset
from mscs.datasets.labels import GENERATED, label_set
from mscs.errors import MscsError, UsageError
from mscs.results import read_json, write_json

SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    manifest: dict[str, Any]
    """dataset, generated (bool), splits (name to count), digest, files ("<sha256> <size> <path>")."""
    problems: list[str]
    """One sentence each, beginning with the path where it concerns a file."""

    def raise_problems(self) -> None:
        """Raise MscsError naming the problems, if any."""
        if self.problems:
            more = len(self.problems) - SHOWN_PROBLEMS
            raise MscsError(
                f"{self.manifest['dataset']}: {len(self.problems)} problems\n"
                + "\n".join(f"  {problem}" for problem in self.problems[:SHOWN_PROBLEMS])
                + (f"\n  ... and {more} more" if more > 0 else "")
            )


def manifest(name: str, root: Path, task: int | None = None, *, progress: bool = True) -> dict[str, Any]:
    """Verify a dataset and return its manifest; raise MscsError if anything is wrong with it."""
    report = verify(name, root, task, progress=progress)
    report.raise_problems()
    return report.manifest


def verify(
    name: str, root: Path, task: int | None = None, *, workers: int | None = None, progress: bool = True
) -> Report:
    """Check counts, decode every image and label, compare sizes, look for unknown label values.

    Args:
        name: cityscapes, ade20k, pascal_context or cadis.
        root: the dataset's root folder; `manifest.json` is written into it when all is well
            and the folder can be written to.
        task: CaDIS only; does not change the outcome.
        workers: threads; None means one per core.
        progress: show a bar on stderr.

    Raises:
        UsageError: unknown dataset, or nothing of it in `root`.
    """
    marker = root / GENERATED
    generated = read_json(marker) if marker.is_file() else None
    expected = (
        {split: generated[split] for split in ("train", "val")} if generated else label_set(name).split_counts
    )
    datasets, problems = _open_splits(name, root, task, expected)
    files: dict[str, str] = {}
    entries = [(dataset, entry) for dataset in datasets for entry in dataset.entries]
    for lines, problem in _in_parallel(entries, workers, f"verifying {name}", progress):
        files |= lines
        problems += problem
    listing = [files[path] for path in sorted(files)]
    found = {
        "dataset": name,
        "generated": generated is not None,
        "splits": {dataset.split: len(dataset) for dataset in datasets},
        "digest": _digest(listing),
        "files": listing,
    }
    if not problems and os.access(root, os.W_OK):  # data may be mounted read-only
        write_json(root / MANIFEST, found)
    return Report(found, problems)


def _open_splits(
    name: str, root: Path, task: int | None, expected: dict[str, int]
) -> tuple[list[Dataset], list[str]]:
    """Open every split that is there; return the datasets and what is wrong with their number of images."""
    datasets: list[Dataset] = []
    problems: list[str] = []
    for split, count in expected.items():
        try:
            dataset = build_dataset(name, split, root, task)
        except UsageError as error:
            if not datasets and split == list(expected)[-1]:
                raise
            problems.append(f"split {split}: {error}")
            continue
        except MscsError as error:
            problems.append(str(error))
            continue
        datasets.append(dataset)
        if len(dataset) != count:
            problems.append(f"split {split}: {len(dataset)} images, expected {count}")
    if not datasets:
        raise MscsError("\n  ".join([f"{name}: no split can be read", *problems]))
    return datasets, problems


def _in_parallel(
    entries: list[tuple[Dataset, Entry]], workers: int | None, text: str, progress: bool
) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Yield `_check` of every entry, in order."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        jobs = [pool.submit(_check, *entry) for entry in entries]
        try:
            for job in tqdm(jobs, desc=text, disable=None if progress else True):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt must not wait for the rest


def _check(dataset: Dataset, entry: Entry) -> tuple[dict[str, str], list[str]]:
    """Return the manifest lines of a sample's files by path, and what is wrong with them."""
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
        unknown = _values(label) - dataset.known_raw_values
        if unknown:
            problems.append(f"{dataset.root / entry.label}: unknown label values {sorted(unknown)}")
    return lines, problems


def _values(label: np.ndarray) -> frozenset[int]:
    counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()
    return frozenset(np.flatnonzero(counts).tolist())


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256(
        "".join(itertools.chain.from_iterable((line, "\n") for line in lines)).encode()
    ).hexdigest()
