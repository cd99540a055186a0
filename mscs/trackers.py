"""Logs of a training elsewhere: DVCLive and TensorBoard. No part of any result.

A tracker is told all rows since step 0, so a training that goes on from a checkpoint leaves the same curves
as one that never stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mscs.errors import UsageError
from mscs.job import Observer

Row = Mapping[str, float]
Write = Callable[[int, Row], None]


def build_tracker(name: str, folder: Path) -> Observer:
    """Return an observer that writes a log of kind `name` for every seed below `folder`.

    Raises UsageError, when it is first called, if the package that writes the log is not installed.
    """
    writers: dict[int, Write] = {}

    def observe(seed: int, history: Sequence[Row]) -> None:
        rows = history[-1:]
        if seed not in writers:
            try:
                writers[seed] = TRACKERS[name](str(folder / name / f"seed-{seed}"))
            except ImportError:
                raise UsageError(f"--log {name} needs the package {name}: pip install 'mscs[log]'") from None
            rows = history
        for row in rows:
            writers[seed](int(row["step"]), {k: v for k, v in row.items() if k != "step"})

    return observe


def _dvclive(folder: str) -> Write:
    from dvclive import Live

    # the defaults would rewrite dvc.yaml and save an experiment from inside a pipeline stage
    live = Live(folder, report=None, dvcyaml=None, save_dvc_exp=False)

    def write(step: int, row: Row) -> None:
        live.step = step
        for key, value in row.items():
            live.log_metric(key, value)
        live.make_summary()

    return write


def _tensorboard(folder: str) -> Write:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(folder, purge_step=0)  # hides the curves of earlier starts

    def write(step: int, row: Row) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write


TRACKERS: dict[str, Callable[[str], Write]] = {"dvclive": _dvclive, "tensorboard": _tensorboard}
