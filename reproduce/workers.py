"""Several trainings side by side in one workspace, each by a DVC process of its own.

DVC locks the files that a stage reads and writes while it runs, and `dvc status` and `dvc repro` want to lock
everything upstream, so they are refused meanwhile. Settings and data therefore come first; then single stages
are repeated side by side (`dvc repro --single-item`), which exclude each other in nothing; tables and figures
are for a plain `dvc repro` afterwards.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mscs.errors import MscsError, UsageError
from reproduce.pipeline import Pipeline

DVC = (sys.executable, "-m", "dvc")
WAITING_SECONDS = 5.0


def repro(plan: Pipeline, *arguments: str) -> list[str]:
    """Return the command `dvc repro` for stages of a profile.

    Where results are in git, weights are not: what lacks only them is not trained again.
    """
    return [*DVC, "repro", *(["--allow-missing"] if plan.in_git else []), *arguments]


class Places:
    """Where trainings run side by side: GPUs, of which each takes what it can use, or places without."""

    def __init__(self, gpus: int | None, jobs: int | None, per_run: int | None = None):
        """Take the first `gpus` GPUs of this machine, at most `per_run` for one run, or `jobs` places.

        Raises:
            UsageError: a number below one, or more GPUs than there are.
        """
        visible = visible_gpus()
        if any(number is not None and number < 1 for number in (gpus, jobs, per_run)):
            raise UsageError("--gpus, --gpus-per-run and --jobs take a number from 1")
        if per_run is not None and per_run > (gpus or 0):
            raise UsageError(f"--gpus-per-run {per_run} takes --gpus N with N from {per_run}")
        if gpus is not None and gpus > len(visible):
            raise UsageError(
                f"--gpus {gpus}: found {len(visible)} GPUs; --jobs N trains N runs side by side without them"
            )
        self._free = visible[:gpus] if gpus else [""] * (jobs or 0)
        self._most = per_run or gpus or 1
        self.count = len(self._free)
        self._turn, self._changed = threading.Lock(), threading.Condition()

    def take(self, groups: int) -> list[str]:
        """Wait for as many places as a run with so many groups of images can use, in the order of asking."""
        count = max(n for n in range(1, self._most + 1) if groups % n == 0)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: len(self._free) >= count)
            taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give_back(self, taken: list[str]) -> None:
        """Let others have these places."""
        with self._changed:
            self._free = [*taken, *self._free]
            self._changed.notify_all()


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES knows this machine's GPUs."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)


def changed(environment: Mapping[str, str], allow_missing: bool) -> set[str]:
    """Return the stages that DVC holds for out of date, so that none is asked about one by one.

    Waits for stages that are at work for another command, perhaps one that was killed. allow_missing: as
    DVC's own option: a stage of which only files are missing counts as up to date.
    """
    command, told = [*DVC, "--wait-for-lock", "status", "--json"], False
    while True:
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        if "is being blocked by" not in done.stderr:
            break
        if not told:
            print(f"waiting for what runs in this folder already: {done.stderr.strip()}", file=sys.stderr)
        told = True
        time.sleep(WAITING_SECONDS)
    if done.returncode:
        raise MscsError(f"`dvc status` failed: {done.stderr.strip()}")
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
    places: Places,
    *,
    keep_going: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Bring `runs` up to date, as many seeds at a time as there are places; return the first bad exit code.

    After a failure no further training is started, unless `keep_going`; those under way end.
    """
    shared, stale = plan.shared_stages(runs), changed(environment, plan.in_git)
    if stale & set(shared):
        code = subprocess.run(repro(plan, *shared), check=False, env=environment).returncode
        if code:
            return code
        stale = changed(environment, plan.in_git)
    waiting = deque(
        (run, pair)
        for run in runs
        for pair in zip(plan.stages_of(run)[::2], plan.stages_of(run)[1::2], strict=True)
        if stale & set(pair)
    )
    failures: list[int] = []
    stopped = threading.Event()

    def work() -> None:
        with suppress(IndexError):  # when none is waiting any more
            while True:
                run, (train, evaluate) = waiting.popleft()
                schedule = plan.params.resolve(run, plan.profile).settings.schedule
                taken = places.take(schedule.groups // schedule.accumulation_steps)
                if not stopped.is_set() and done(train, taken):
                    places.give_back(taken[1:])  # an evaluation uses one
                    taken = taken[:1]
                    done(evaluate, taken)
                places.give_back(taken)

    def done(stage: str, taken: list[str]) -> bool:
        own = {"CUDA_VISIBLE_DEVICES": ",".join(taken)} if any(taken) else {}
        command = [*DVC, "--wait-for-lock", "repro", "--single-item", stage]
        code = subprocess.run(command, check=False, env={**environment, **own}).returncode
        if code:
            failures.append(code)
            if not keep_going:
                stopped.set()
                waiting.clear()
            print(f"{stage} failed with exit code {code}", file=sys.stderr)
        return not code

    threads = [threading.Thread(target=work) for _ in range(places.count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        stopped.set()
        waiting.clear()
        raise
    return failures[0] if failures else 0
