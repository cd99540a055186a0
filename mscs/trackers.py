"""What watches a training: DVCLive, TensorBoard and pictures of predictions. No part of any result.

A tracker is an observer of `mscs.train`: called with a snapshot at every logging step. It is told all rows
since step 0, so a training that goes on from a checkpoint leaves the same curves as one that never stopped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.nn import functional as F

from mscs.errors import UsageError, unknown_name
from mscs.results import atomic_path
from mscs.train import Observer, Snapshot
from mscs.transforms import IMAGENET_MEAN, IMAGENET_STD

Row = Mapping[str, float]
Write = Callable[[Row], None]


def build_tracker(name: str, folder: Path) -> Observer:
    """Return an observer that writes a log of kind `name` for every seed below `folder`.

    Raises:
        UsageError: unknown name, or its package is not installed.
    """
    if name not in TRACKERS:
        raise UsageError(unknown_name("log", name, TRACKERS))
    writers: dict[int, Write] = {}

    def observe(snapshot: Snapshot) -> None:
        rows: Sequence[Row] = snapshot.history[-1:]
        if snapshot.seed not in writers:
            writers[snapshot.seed] = TRACKERS[name](folder / name / f"seed-{snapshot.seed}")
            rows = snapshot.history
        for row in rows:
            writers[snapshot.seed](row)

    return observe


def sample_pictures(folder: Path, colors: Sequence[tuple[int, int, int]], every: int) -> Observer:
    """Return an observer that writes image, label and prediction side by side, each `every` log rows.

    The first image of the batch is shown as the network saw it: cropped, flipped, recoloured. Ignored pixels
    are black in the label.
    """
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colors)] = colors

    def observe(snapshot: Snapshot) -> None:
        if (len(snapshot.history) - 1) % every:
            return
        image = snapshot.images[0].float().cpu().permute(1, 2, 0).numpy()
        pixels = (image * IMAGENET_STD + IMAGENET_MEAN).clip(0, 1) * 255
        label = snapshot.labels[0].cpu().numpy()
        logits = F.interpolate(snapshot.logits[:1].detach().float(), size=label.shape, mode="bilinear")
        prediction = logits[0].argmax(0).cpu().numpy()
        sheet = np.hstack([pixels.round().astype(np.uint8), palette[label], palette[prediction]])
        step = int(snapshot.history[-1]["step"])
        with atomic_path(folder / f"seed-{snapshot.seed}-step-{step:06d}.png") as temporary:
            Image.fromarray(sheet).save(temporary, format="PNG")

    return observe


def _dvclive(folder: Path) -> Write:
    try:
        from dvclive import Live
    except ImportError:
        raise _missing("dvclive") from None
    # the defaults would rewrite dvc.yaml and save an experiment from inside a pipeline stage
    live = Live(str(folder), report=None, dvcyaml=None, save_dvc_exp=False)

    def write(row: Row) -> None:
        live.step = int(row["step"])
        for key, value in _values(row):
            live.log_metric(key, value)
        live.make_summary()

    return write


def _tensorboard(folder: Path) -> Write:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard") from None
    writer: Any = SummaryWriter(str(folder), purge_step=0)  # hides the curves of earlier starts

    def write(row: Row) -> None:
        for key, value in _values(row):
            writer.add_scalar(key, value, int(row["step"]))
        writer.flush()

    return write


def _values(row: Row) -> Iterator[tuple[str, float]]:
    return ((key, value) for key, value in row.items() if key != "step")


def _missing(package: str) -> UsageError:
    return UsageError(f"--log {package} needs the package {package}; `pip install 'mscs[log]'` installs it")


TRACKERS: dict[str, Callable[[Path], Write]] = {"dvclive": _dvclive, "tensorboard": _tensorboard}
