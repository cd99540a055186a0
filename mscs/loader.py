"""Training batches as a function of (seed, step) alone.

The order of samples is a permutation per epoch, the augmentation of a sample a function of (seed, epoch,
sample). So every number of workers and processes gives the same global batches, and a loader that starts at
step t continues the stream of one that started at 0.
"""

import functools
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mscs.datasets.base import Dataset, Sample
from mscs.errors import MscsError, UsageError
from mscs.seeding import numpy_generator

STALLED_SECONDS = 600
"""A batch that worker processes have not read after this time will not come: a disk or network hangs."""
LAST_SECONDS = 60
"""How long a worker outlives SIGTERM, which launchers send to every process of a training at once."""


class Batch(NamedTuple):
    """One process's part of a global batch: images float32 (b, 3, h, w), labels int64 (b, h, w)."""

    images: Tensor
    labels: Tensor
    ids: list[str]
    step: int


class Transform(Protocol):
    """What turns a sample into tensors, e.g. `mscs.transforms.TrainTransform`."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the image and the label."""


class Draw(NamedTuple):
    """Which sample to read, and the epoch that its augmentation belongs to."""

    epoch: int
    sample: int


@functools.lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> list[int]:
    return numpy_generator(seed, "order", epoch).permutation(num_samples).tolist()


def draws_of_step(num_samples: int, batch_size: int, seed: int, step: int) -> list[Draw]:
    """Return the global batch of a step: the next slice of the epoch's permutation, incomplete ones dropped.

    A dataset smaller than a batch is drawn from again, in a new permutation that counts as a new epoch.
    """
    if num_samples >= batch_size:
        epoch, position = divmod(step, num_samples // batch_size)
        first = epoch * num_samples + position * batch_size
    else:
        first = step * batch_size
    places = (divmod(place, num_samples) for place in range(first, first + batch_size))
    return [Draw(epoch, _permutation(num_samples, seed, epoch)[position]) for epoch, position in places]


def train_loader(
    dataset: Dataset,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    num_steps: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Iterate over the batches of steps start_step .. num_steps - 1.

    Args:
        dataset: what to read.
        transform: called as transform(sample, rng).
        batch_size: of the global batch; each of `world_size` processes gets the rank-th contiguous part.
        seed: of the order and the augmentation.
        num_steps: one past the last step.
        start_step: first step.
        rank: of this process.
        world_size: number of processes.
        num_workers: processes that read ahead; 0 reads in this one.
        pin_memory: copy batches to page-locked memory (for transfers to a GPU).

    Raises:
        UsageError: the batch cannot be divided among the processes.
    """
    if batch_size < 1 or batch_size % world_size:
        raise UsageError(
            f"a global batch of {batch_size} cannot be divided among {world_size} processes; use a multiple"
        )
    loader = DataLoader(
        _Batches(dataset, transform, batch_size, seed, rank, world_size),
        batch_size=None,
        sampler=range(start_step, num_steps),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
        prefetch_factor=2 if num_workers else None,
        timeout=STALLED_SECONDS if num_workers else 0,
    )
    for batch in loader:
        if isinstance(batch, MscsError):
            raise batch
        yield batch


@dataclass
class _Batches(torch.utils.data.Dataset):
    """What one process trains on, by step."""

    dataset: Dataset
    transform: Transform
    batch_size: int
    seed: int
    rank: int
    world_size: int

    def __getitem__(self, step: int) -> Batch | MscsError:
        part = self.batch_size // self.world_size
        draws = draws_of_step(len(self.dataset), self.batch_size, self.seed, step)[self.rank * part :][:part]
        images, labels, ids = [], [], []
        for epoch, place in draws:
            try:
                sample = self.dataset[place]
            except MscsError as error:
                return error  # raised in a worker, it would arrive buried in a traceback
            image, label = self.transform(sample, numpy_generator(self.seed, "augment", epoch, place))
            images.append(image)
            labels.append(label)
            ids.append(sample.id)
        return Batch(torch.stack(images), torch.stack(labels), ids, step)


def _prepare_worker(_worker: int) -> None:
    """One thread per worker, since the workers are the parallelism; and no end before the training's own.

    Told to stop, the training finishes its step and saves, for which it needs its workers alive.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_SECONDS))
