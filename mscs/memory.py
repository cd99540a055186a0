"""Does a run fit into memory here? Measured with its own first steps, as it is and with what needs less.

Every try is a training of `STEPS` steps by `mscs train`, in a process and a folder of its own: it needs what
the run needs, and leaves what is here as it is.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mscs.errors import MscsError
from mscs.params import Params
from mscs.paths import RESULTS, WORK, data_root
from mscs.provenance import machine, nvidia
from mscs.results import read_json, read_mapping, write_json
from mscs.settings import Settings

STEPS = 2
"""The optimizer's state exists from the second on."""
TRIAL = {"steps": STEPS, "lr": 0.0}
OUT_OF_MEMORY = "the GPU's memory does not hold"
"""What a training says then, see `mscs.monitor`; where main memory is short the system kills it."""
OWN = {WORK.name, RESULTS.name, ".git", ".dvc"}
"""What a try's folder does not take over from the project's."""


def device() -> str:
    """Return the name of the first GPU, or of the processor."""
    gpus, _, _ = nvidia()
    facts = machine()
    return gpus[0][0] if gpus else f"{facts['cpu']}, {facts['cpus']} cores"


def ladder(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield what --set has to change, from nothing to all that needs less memory, mildest first."""
    changes: dict[str, Any] = {}
    yield changes
    if not settings.model.options.get("checkpointing"):
        changes = {"model_options": {"checkpointing": True}}  # slower, the same result
        yield changes
    if settings.machine.precision == "fp32":
        changes = {**changes, "precision": "bf16"}
        yield changes
    schedule = settings.schedule
    if schedule.accumulation_steps < schedule.groups:
        changes = {**changes, "accumulation_steps": schedule.groups}
        # another model: batch norm sees parts of the batch
        yield {**changes, "batch_norm": "part"} if schedule.batch_norm == "batch" else changes


def command(run: str, profile: str, changes: Mapping[str, Any]) -> str:
    """Return the command line that trains a run with these changes."""
    words = ["mscs", "train", run, "--profile", profile]
    for key, value in changes.items():
        words += ["--set", f"{key}={json.dumps(value)}" if not isinstance(value, str) else f"{key}={value}"]
    return shlex.join(words)


def measure(params: Params, run: str, profile: str) -> None:
    """Try a run with ever more changes until it fits; write down what each try needed.

    Raises:
        MscsError: a try failed for another reason than memory.
    """
    file, name = _file(profile, run), device()
    kept = read_json(file) if file.is_file() else []
    for changes in ladder(params.resolve(run, profile).settings):
        settings = params.resolve(run, profile, {**changes, **TRIAL}).settings
        print(f"trying {command(run, profile, changes)}", flush=True)
        row = {
            "device": name,
            "digest": settings.digest(),
            "set": changes,
            "peak_bytes": _peak(settings, changes),
        }
        kept = [other for other in kept if (other["device"], other["digest"]) != (name, row["digest"])]
        kept.append(row)
        write_json(file, kept)
        if row["peak_bytes"] is not None:
            return


def fit(params: Params, run: str, profile: str, name: str) -> dict[str, Any] | None:
    """Return the mildest measured way to train a run on a device; None where it was never measured.

    The record has the changes (`set`) and `peak_bytes`, which is None where nothing that was tried fitted.
    """
    file = _file(profile, run)
    rows = [row for row in (read_json(file) if file.is_file() else ()) if row["device"] == name]
    digests = (params.resolve(run, profile, {**row["set"], **TRIAL}).settings.digest() for row in rows)
    valid = [row for row, digest in zip(rows, digests, strict=True) if row["digest"] == digest]
    return min(valid, key=lambda row: (row["peak_bytes"] is None, len(row["set"])), default=None)


def _file(profile: str, run: str) -> Path:
    return WORK / profile / "memory" / f"{run}.json"


def _peak(settings: Settings, changes: Mapping[str, Any]) -> int | None:
    """Return the peak in bytes of a short training with these changes, None if memory does not hold it."""
    with tempfile.TemporaryDirectory(prefix="mscs-memory-") as folder:
        for path in Path.cwd().iterdir():
            if path.name not in OWN:
                (Path(folder) / path.name).symlink_to(path)
        words = shlex.split(command(settings.run, settings.profile, {**changes, **TRIAL}))
        words += ["--data-root", str(data_root(settings).resolve())]
        words += ["--seed", str(settings.seeds[0]), "--processes", "1"]
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == -9 or OUT_OF_MEMORY in done.stderr:
            return None
        if done.returncode:
            raise MscsError(f"the trial failed: {done.stderr.strip().splitlines()[-1]}")
        [record] = Path(folder).glob(f"{RESULTS}/*/runs/*/seed-*/run.json")
        return int(read_mapping(record)["peak_bytes"])
