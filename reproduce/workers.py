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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mscs.errors import UsageError
from reproduce import pipeline
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


def upstream(plan: Pipeline, runs: Sequence[str]) -> list[str]:
    """Return the stages that several runs share: the settings and the data."""
    profile = plan.params.profile
    home = plan.datasets(pipeline.default_runs(plan.params))
    names = [f"resolve@{profile}"]
    for dataset in plan.datasets(runs):
        names.append(f"{'' if dataset in home else f'{pipeline.ROWS_FILE}:'}data@{profile}-{dataset}")
    return names


def changed(environment: Mapping[str, str]) -> set[str]:
    """Return the stages that DVC holds for out of date, so that none is asked about one by one."""
    command = [*DVC, "--wait-for-lock", "status", "--json"]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return set(json.loads(done.stdout or "{}"))


def side_by_side(
    plan: Pipeline,
    runs: Sequence[str],
    workers: Sequence[Mapping[str, str]],
    *,
    keep_going: bool = False,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Bring `runs` up to date, as many seeds at a time as there are workers; return the first bad exit code.

    After a failure no further training is started, unless `keep_going`; those under way end.
    """
    base = {**os.environ, **(environment or {})}
    code = subprocess.run([*DVC, "repro", *upstream(plan, runs)], check=False, env=base).returncode
    if code:
        return code
    stale = changed(base)
    pairs = [pair for run in runs for pair in _pairs(plan.stages_of(run))]
    waiting: Iterator[tuple[str, str]] = iter([pair for pair in pairs if stale & set(pair)])
    failures: list[int] = []
    lock, stop = threading.Lock(), threading.Event()

    def next_pair() -> tuple[str, str] | None:
        with lock:
            return None if stop.is_set() else next(waiting, None)

    def work(own: Mapping[str, str]) -> None:
        while (pair := next_pair()) is not None:
            for stage in pair:
                command = [*DVC, "--wait-for-lock", "repro", "--single-item", stage]
                code = subprocess.run(command, check=False, env={**base, **own}).returncode
                if code:
                    failures.append(code)
                    if not keep_going:
                        stop.set()
                    print(f"{stage} failed with exit code {code}", file=sys.stderr)
                    break

    threads = [threading.Thread(target=work, args=(own,)) for own in workers]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        stop.set()
        raise
    return failures[0] if failures else 0


def _pairs(stages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (train, evaluate) of each seed."""
    return zip(stages[::2], stages[1::2], strict=True)
