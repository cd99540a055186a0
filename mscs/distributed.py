"""Where this process stands among its peers; every function is a no-op for a single process.

`torchrun` is the only launcher. A batch is divided by groups of images: their number says how many processes
can share it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mscs.errors import UsageError


@dataclass(frozen=True)
class World:
    """Rank and size of the process group, and the device of this process."""

    rank: int
    size: int
    device: torch.device
    hosts: Any = None
    """Group for messages between the processes' CPUs; None is the default group."""

    def largest(self, value: int) -> int:
        """Return the largest of all processes' values, without waiting for any GPU."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.hosts)
        return int(box)

    def smallest(self, value: int) -> int:
        """Return the smallest of all processes' values, without waiting for any GPU."""
        return -self.largest(-value)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Join the process group that torchrun announces in the environment, and leave it at the end.

    `device` is "auto" (CUDA where there is one), "cpu" or "cuda".
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device cuda was asked for, but PyTorch sees no GPU; run `mscs doctor`, or use --device cpu"
        )
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"process {local_rank + 1} of this machine has no GPU of its own: PyTorch sees "
            f"{torch.cuda.device_count()}; start no more processes than that, or use --device cpu"
        )
    place = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        world = World(rank, size, place, dist.new_group(backend="gloo") if on_gpu else None)
        world.largest(0)  # waits for all: a process with nothing to do must not end before others have joined
        yield world
    finally:
        dist.destroy_process_group()


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Average `tensor` over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def barrier() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether an error says that another process is gone."""
    return isinstance(error, dist.DistError) or "by peer" in str(error)
