"""Work on many files at once, by threads under one progress bar."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm


def in_parallel(
    work: Callable[[Any], Any], items: Sequence[Any], text: str, *, workers: int | None, progress: bool
) -> Iterator[Any]:
    """Yield `work` of every item in order, done by threads (None: one per core) under a progress bar."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        jobs = [pool.submit(work, item) for item in items]
        try:
            for job in tqdm(jobs, desc=text, disable=None if progress else True):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt must not wait for the rest
