"""What watches a training beside its loop: non-finite values, progress, signals, failures of the machine."""

import contextlib
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from mscs.distributed import World, is_lost_peer
from mscs.errors import MscsError
from mscs.loader import STALLED_SECONDS, Batch
from mscs.results import write_json
from mscs.settings import Settings

HIDDEN = ("step", "groups", "views", "anchors")
"""Beginnings of the names in a log row that go to files only."""


class Stopped(MscsError):
    """The run was asked to stop by a signal; its checkpoint is written."""

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}; the same command goes on from there")
        self.exit_code = 128 + signum


class FiniteGuard:
    """Finds the first non-finite term without waiting for the GPU at every step."""

    _NEVER = 2**62

    def __init__(self, world: World, folder: Path, seed: int):
        self._world, self._folder, self._seed = world, folder, seed
        self._first_bad = torch.full((), self._NEVER, dtype=torch.long, device=world.device)
        self._recent: dict[int, tuple[list[str], dict[str, Tensor]]] = {}
        self._eager = world.device.type == "cpu"

    def watch(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        """Remember the terms of a step; on a CPU check them at once."""
        values = torch.stack([value.to(terms["loss"]) for value in terms.values()])
        bad = ~values.isfinite().all()
        self._first_bad = torch.where(bad, self._first_bad.clamp(max=batch.step), self._first_bad)
        self._recent[batch.step] = batch.ids, terms
        if self._eager:
            self.check()

    def check(self) -> None:
        """Raise MscsError naming term, step and images where a value was not finite on any process.

        A bad term makes everyone's gradient bad: a process whose own terms are sound names that one.
        """
        step = self._world.smallest(int(self._first_bad))
        recent, self._recent = self._recent, {}
        if step in recent:
            self._fail(step, *recent[step])

    def _fail(self, step: int, ids: list[str], found: dict[str, Tensor]) -> None:
        terms = {name: float(value) for name, value in found.items()}
        name = next((k for k in reversed(terms) if not math.isfinite(terms[k])), None)
        if name is None:
            raise MscsError(f"a term of the loss is not finite at step {step} on another process")
        newest = max(map(str, self._folder.glob("step-*.pt")), default=None)
        rank = self._world.rank
        report = self._folder / (f"failure-{rank}.json" if rank else "failure.json")
        facts = {"term": name, "step": step, "images": ids, "seed": self._seed, "last_checkpoint": newest}
        write_json(report, {**facts, "terms": {k: str(v) for k, v in terms.items()}})
        raise MscsError(
            f"loss term {name!r} is {terms[name]} at step {step} (images {', '.join(ids)}); the same command "
            f"comes here again from the last checkpoint, facts in {report}. Lower lr, or train in fp32"
        )


class Progress:
    """Prints the log of the main process, with speed and memory since the last row."""

    def __init__(self, settings: Settings, seed: int, world: World, start: int):
        self._schedule, self._world, self._begun = settings.schedule, world, time.perf_counter()
        self._name = f"{settings.run} seed {seed}"
        self._last = (self._begun, start)

    @property
    def seconds(self) -> float:
        """Seconds since this start of the run."""
        return time.perf_counter() - self._begun

    def show(self, row: Mapping[str, float]) -> None:
        """Print one log row."""
        now, step = time.perf_counter(), int(row["step"])
        steps_per_second = (step - self._last[1]) / max(now - self._last[0], 1e-9)
        self._last = (now, step)
        shown = {k: f"{v:.3g}" for k, v in row.items() if not k.startswith(HIDDEN)}
        shown["images/s"] = f"{steps_per_second * self._schedule.batch_size:.3g}"
        shown["GiB"] = f"{peak_bytes(self._world.device) / 2**30:.3g}"
        text = " ".join(f"{key} {value}" for key, value in shown.items())
        left = timedelta(seconds=round((self._schedule.steps - step) / steps_per_second))
        if self._world.is_main:
            print(f"{self._name} step {step}/{self._schedule.steps} {text} left {left}", flush=True)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: of its GPU, or of the machine where it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list; the processes agree on them at the end of a step."""
    received: list[int] = []

    def remember(signum: int, _frame: object) -> None:
        received.append(signum)

    try:
        previous = {s: signal.signal(s, remember) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: the caller deals with signals
        previous = {}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def explained(settings: Settings, world: World) -> Iterator[None]:
    """Turn failures of the machine into what to do about them."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        again = "The same command goes on from the last checkpoint"
        if isinstance(error, torch.OutOfMemoryError):
            images = settings.schedule.batch_size // world.size
            said = (
                f"the GPU's memory does not hold {images} images per process ({reason}) The same result with "
                f"less: --set model_options={{checkpointing: true}}, or more processes on as many GPUs. "
                f"`mscs doctor {settings.run} --profile {settings.profile} --measure` tries what else helps"
            )
        elif world.size > 1 and is_lost_peer(error):
            said = f"another process of this training was lost; its own message says why. {again}"
        elif "DataLoader timed out" in reason:
            said = (
                f"no batch came from the processes that read images for {STALLED_SECONDS} s: does the folder "
                f"of the dataset hang (network disk)? {again}"
            )
        elif "DataLoader worker" in reason:
            said = (
                f"a process that reads images died ({reason}). Where memory or /dev/shm is short, use fewer "
                f"--workers. {again}"
            )
        else:
            raise
        raise MscsError(said) from error
