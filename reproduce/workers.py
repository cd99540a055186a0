"""Several trainings side by side in one workspace, each by a DVC process of its own.

DVC locks a stage's files and everything upstream of it, so the settings and the data come first; then every
worker repeats single stages (`dvc repro --single-item`), which lock nothing in common; what is left, tables
and figures, is for a plain `dvc repro` afterwards.
"""

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mscs.errors import UsageError
from reproduce.pipeline import Pipeline

DVC = (sys.executable, "-m", "dvc")


def devices(gpus: int | None, jobs: int | None) -> list[Mapping[str, str]]:
    """Return what each worker adds to its environment: a GPU of its own, or nothing.

    Raises:
        UsageError: fewer than one worker, or fewer GPUs than asked for.
    """
    if (gpus if gpus is not None else jobs or 0) < 1:
        raise UsageError("--gpus and --jobs take a number from 1")
    if gpus is None:
        return [{} for _ in range(jobs or 0)]
    visible = visible_gpus()
    if gpus > len(visible):
        raise UsageError(
            f"--gpus {gpus}: found {len(visible)} GPUs; --jobs N trains N runs side by side without them"
        )
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible[:gpus]]


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES knows this machine's GPUs."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)


def changed(environment: Mapping[str, str], allow_missing: bool) -> set[str]:
    """Return the stages that DVC holds for out of date, so that none is asked about one by one.

    allow_missing: as DVC's own option: a stage of which only files are missing counts as up to date.
    """
    command = [*DVC, "--wait-for-lock", "status", "--json"]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    found: dict[str, list[Any]] = json.loads(done.stdout or "{}")
    return {stage for stage, changes in found.items() if not (allow_missing and _only_missing(changes))}


def _only_missing(changes: list[Any]) -> bool:
    """Return whether files that are not there are all that `dvc status` says of a stage."""
    files = [found for change in changes if isinstance(change, dict) for found in change.values()]
    whole = len(files) == len(changes) and all(isinstance(found, dict) for found in files)
    return whole and all(state == "deleted" for found in files for state in found.values())


def side_by_side(
    plan: Pipeline,
    runs: Sequence[str],
    workers: Sequence[Mapping[str, str]],
    *,
    keep_going: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Bring `runs` up to date, as many seeds at a time as there are workers; return the first bad exit code.

    After a failure no further training is started, unless `keep_going`; those under way end.
    """
    shared = [*DVC, "repro", *(["--allow-missing"] if plan.in_git else []), *plan.shared_stages(runs)]
    code = subprocess.run(shared, check=False, env=environment).returncode
    if code:
        return code
    stale = changed(environment, plan.in_git)
    stages = [stage for run in runs for stage in plan.stages_of(run)]
    waiting = deque(pair for pair in zip(stages[::2], stages[1::2], strict=True) if stale & set(pair))
    failures: list[int] = []

    def work(own: Mapping[str, str]) -> None:
        with suppress(IndexError):  # when none is waiting any more
            while True:
                for stage in waiting.popleft():
                    command = [*DVC, "--wait-for-lock", "repro", "--single-item", stage]
                    code = subprocess.run(command, check=False, env={**environment, **own}).returncode
                    if code:
                        failures.append(code)
                        if not keep_going:
                            waiting.clear()
                        print(f"{stage} failed with exit code {code}", file=sys.stderr)
                        break

    threads = [threading.Thread(target=work, args=(own,)) for own in workers]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        waiting.clear()
        raise
    return failures[0] if failures else 0
