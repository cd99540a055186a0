"""What a target costs before anything is started: steps, images, GPU-hours, wall time, and what is done.

Times come from files that benchmarks/step.py wrote on the same device, and are of training alone. A step of a
run is four groups of images; on one GPU they are computed as one batch, here counted as four times one group.
Where nothing was measured the answer is "unknown".
"""

import heapq
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mscs.errors import MscsError
from mscs.paths import WORK, SeedFiles, checkpoint_folder
from mscs.provenance import machine
from mscs.results import read_json
from mscs.settings import Settings
from reproduce.rendering import markdown_table

MEASURED = Path("benchmarks/results")
SCRIPT = Path("benchmarks/step.py")
OPTIONS = ("precision", "tf32", "channels_last", "compile", "deterministic")


@dataclass(frozen=True)
class Cost:
    """One run: what it takes, and how far it is. Hours of one device; None is unknown."""

    run: str
    state: str
    steps: int
    left: int
    images: int
    hours: float | None
    group_bytes: int | None

    def rest(self) -> "Cost":
        """Return what has still to be done."""
        share = self.left / self.steps
        hours = None if self.hours is None else self.hours * share
        return replace(self, steps=self.left, images=round(self.images * share), hours=hours)


def costs(runs: Iterable[Settings], device: str) -> list[Cost]:
    """Return the cost of each run on `device`, as `device_name` gives it."""
    found = []
    for settings in runs:
        schedule, row = settings.schedule, measurement(settings, device)
        steps = schedule.steps * len(settings.seeds)
        hours = None if row is None else steps * schedule.groups * row["step_ms"] / 3.6e6
        left = steps - sum(saved_steps(settings, seed) for seed in settings.seeds)
        states = {state(settings, seed) for seed in settings.seeds}
        now = states.pop() if len(states) == 1 else "started"
        if now == "to do" and left < steps:
            now = "started"
        memory = None if row is None else row["peak_bytes"]
        found.append(Cost(settings.run, now, steps, left, steps * schedule.batch_size, hours, memory))
    return found


def saved_steps(settings: Settings, seed: int) -> int:
    """Return how many steps of a seed are done: all of a finished training, else those of its checkpoint."""
    if state(settings, seed) != "to do":
        return settings.schedule.steps
    newest = max(checkpoint_folder(settings, seed).glob("step-*.json"), default=None)
    return 0 if newest is None else int(read_json(newest)["step"])


def state(settings: Settings, seed: int) -> str:
    """Return "done", "trained" (not evaluated) or "to do", from the results of a seed that are there."""
    files = SeedFiles(settings.profile, settings.run, seed)
    with suppress(MscsError, KeyError):
        record = read_json(files.record)
        made_with = record["digest"], record["settings"]["numerics"]["train"]
        if made_with == (settings.digest(), settings.numerics["train"]):
            return "done" if files.evaluation.exists() else "trained"
    return "to do"


def measurement(settings: Settings, device: str) -> dict[str, Any] | None:
    """Return what was last measured on `device` for a run's network, loss, group of images and options."""
    return next((row for name, row in _measured(settings) if name == device), None)


def hours_on_slowest_gpu(settings: Settings) -> float | None:
    """Return the hours that one seed takes on one GPU, the slowest that was measured; None if none was."""
    steps = settings.schedule.steps * settings.schedule.groups
    times = [row["step_ms"] for name, row in _measured(settings) if not name.endswith(" cores")]
    return steps * max(times) / 3.6e6 if times else None


def _measured(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (device, row) of what fits a run's network, loss, group of images and options, newest first."""
    folders = (WORK / settings.profile / "benchmark", MEASURED)
    files = [file for folder in folders for file in folder.glob("step-*.json")]
    for file in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        document = read_json(file)
        if (document["profile"], document["quick"]) != (settings.profile, False):
            continue
        for row in document["results"]:
            same = all(row["options"].get(key, False) == getattr(settings.machine, key) for key in OPTIONS)
            found = (row["row"], row.get("loss"), row["batch"])
            wanted = (settings.schedule.name, settings.loss.name, settings.schedule.images_per_group)
            if same and found == wanted and "failed" not in row:
                yield document["device"], row


def device_name() -> str:
    """Return the first GPU's name, or the processor's, as benchmarks/step.py names it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    facts = machine()
    return f"{facts['cpu']}, {facts['cpus']} cores"


def measure(settings: Sequence[Settings]) -> None:
    """Measure the networks of some runs here, a few steps each; files go to the profile's work folder."""
    if not SCRIPT.exists():
        raise MscsError(f"{SCRIPT} is missing; measure in a checkout of the project")
    profile = settings[0].profile
    command = [sys.executable, str(SCRIPT), "--profile", profile, "--variants", "settings", "--repeats", "3"]
    command += ["--output", str(WORK / profile / "benchmark"), "--runs", *(item.run for item in settings)]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        raise MscsError("the measurement failed; its own message says why")


def wall_hours(hours: Iterable[float], devices: int) -> float:
    """Return when the last run ends if each goes, in order, to the device that is free first."""
    free = [0.0] * devices
    for one in hours:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def document(
    found: Sequence[Cost], device: str, devices: int, fits: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the plan as plain values; `fits` tells by run what `mscs.memory.fit` knows."""
    return {
        "device": device,
        "devices": devices,
        "runs": [{**vars(cost), "fits": (fits or {}).get(cost.run)} for cost in found],
        "total": _total(found, devices),
        "to_do": _total([cost.rest() for cost in found if cost.left], devices),
    }


def _total(found: Sequence[Cost], devices: int) -> dict[str, Any]:
    known = [cost.hours for cost in found if cost.hours is not None]
    complete = len(known) == len(found)
    return {
        "runs": len(found),
        "steps": sum(cost.steps for cost in found),
        "images": sum(cost.images for cost in found),
        "hours": sum(known) if complete else None,
        "wall_hours": wall_hours(known, devices) if complete else None,
    }


def text(plan: dict[str, Any]) -> str:
    """Return the plan as lines for people."""
    rows = [
        [
            *(run["run"], run["state"], f"{run['steps']:,}", f"{run['images']:,}", _number(run["hours"])),
            _number(run["group_bytes"] and run["group_bytes"] / 2**30),
            _fit(run["fits"]),
        ]
        for run in plan["runs"]
    ]
    lines = [markdown_table(["run", "state", "steps", "images", "hours", "GiB", "fits"], rows, aligned=True)]
    for name in ("total", "to_do"):
        sums = plan[name]
        counted = f"{sums['runs']} runs, {sums['steps']:,} steps, {sums['images']:,} images"
        hours, wall = _number(sums["hours"]), _number(sums["wall_hours"])
        where = f"{plan['devices']} x {plan['device']}"
        lines.append(f"{name.replace('_', ' ')}: {counted}, {hours} device-hours, {wall} hours on {where}")
    if plan["total"]["hours"] is None:
        lines.append("unknown: never measured on this device; --measure does that, in minutes")
    if any(run["fits"] is None for run in plan["runs"]):
        lines.append("fits unknown: never tried on this device; `mscs doctor RUN --measure` does that")
    lines.append("Hours are of training on one device, GiB of one group of images. Nothing was started.")
    return "\n".join(lines)


def _fit(found: Mapping[str, Any] | None) -> str:
    if found is None or found["peak_bytes"] is None:
        return "unknown" if found is None else "no"
    changes = f" with {', '.join(found['set'])}" if found["set"] else ""
    return f"{_number(found['peak_bytes'] / 2**30)} GiB{changes}"


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.1f}" if value >= 10 else f"{value:.2g}"
