"""Everything that needs a GPU, in one command for the day one is there: `python -m reproduce gpu`.

A sequence of items (`benchmarks.gpu_items`), each of which consists of jobs. The first round takes what
matters most of every item, in order, the second round the rest. Every item works in a process of its own
under a time limit, so that a crash ends a job and not the sequence. A job whose estimated time does not fit
the minutes left is skipped and named. Each result is written the moment it is there; the same file is the
state from which the next call goes on. Results of two devices, or of a dry run, never share a file.
"""

import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mscs.errors import MscsError
from mscs.params import Params
from mscs.results import read_mapping, write_json

ESTIMATED_FOR = 790e12
"""FLOP/s of fp16 products of the device (an H100) for which the jobs' seconds were estimated."""
START = 8.0  # seconds until a process has loaded PyTorch and found the GPU
SPARE = 5.0  # seconds kept for the page
PATIENCE, PATIENCE_SECONDS = 4.0, 60.0  # times its estimate a job may take, and so many seconds more
MEASURED, FAILED, CUT_OFF = "measured", "failed", "cut off"


@dataclass(frozen=True)
class Job:
    """One measurement: what is given to its item's function, and the seconds that takes on an H100."""

    name: str
    seconds: float
    arguments: Mapping[str, Any]
    later: bool = False
    """Belongs to the second round."""


@dataclass(frozen=True)
class Context:
    """What an item makes its jobs from; `results` are those of all items so far, by item and job."""

    params: Params
    dry_run: bool
    out: Path
    device: str
    results: Mapping[str, Mapping[str, Any]]

    def measured(self, item: str) -> list[dict[str, Any]]:
        """Return what an item's jobs gave."""
        found = self.results.get(item, {}).values()
        return [entry["result"] for entry in found if entry["state"] == MEASURED]


@dataclass(frozen=True)
class Item:
    """A group of jobs that one function carries out.

    `run(**arguments)` returns a result (JSON values), or yields better and better versions of it.
    """

    name: str
    title: str
    jobs: Callable[[Context], list[Job]]
    run: Callable[..., Any]


class Worker:
    """A process that carries out jobs one after the other, in a session of its own."""

    def __init__(self, log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mscs.build"])  # with PyTorch and timm: they take seconds
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, log))
        self.process.start()
        other.close()

    def ask(self, run: Callable[..., Any], arguments: Mapping[str, Any], limit: float) -> Iterator[Any]:
        """Yield (state, result or message) until a job ends; after a failure the worker is gone."""
        end = time.monotonic() + limit
        try:
            self.connection.send((run, dict(arguments)))
            while self.connection.poll(max(0.0, end - time.monotonic())):
                state, value = self.connection.recv()
                yield state, value
                if state != CUT_OFF:
                    return
            self.close()
            yield CUT_OFF, None
        except (EOFError, OSError):
            self.process.join()
            yield FAILED, f"the process ended with exit code {self.process.exitcode}; the log says more"

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self.process.is_alive() and not self.connection.closed

    def close(self) -> None:
        """End the process and all that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


def serve(connection: Connection, log: Path) -> None:
    """Carry out the jobs that come over the connection; everything printed goes to the log."""
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    while True:
        try:
            run, arguments = connection.recv()
        except EOFError:
            return
        try:
            result = run(**arguments)
            if isinstance(result, Iterator):
                for part in result:
                    result = part
                    connection.send((CUT_OFF, part))  # stands until a better one comes
            connection.send((MEASURED, result))
        except Exception as error:
            traceback.print_exc()
            if type(error).__name__ == "OutOfMemoryError":
                connection.send((MEASURED, {"failed": "out of memory"}))
                continue
            connection.send((FAILED, f"{type(error).__name__}: {error}"[:500]))
            return  # the next job gets a fresh process: this one's GPU may be in any state


def slug(name: str) -> str:
    """Return a device's name as it stands in file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass
class Run:
    """One call of the sequence."""

    params: Params
    out: Path
    deadline: float
    dry_run: bool
    document: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()
    skipped: list[str] = field(default_factory=list)
    failures: int = 0

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.deadline - SPARE - time.monotonic()

    @property
    def context(self) -> Context:
        """What items make their jobs from, now."""
        return Context(self.params, self.dry_run, self.out, self.document["device"], self.document["results"])

    def open(self, facts: Mapping[str, Any]) -> None:
        """Go on from the state file of this device, or begin one."""
        name = "gpu-dry-run" if self.dry_run else f"gpu-{slug(facts['device'])}"
        self.path = self.out / f"{name}.json"
        if self.path.exists():
            self.document = read_mapping(self.path)
        else:
            self.document = {
                "device": facts["device"],
                "dry_run": self.dry_run,
                "sessions": [],
                "results": {},
            }
        self.document["sessions"].append(facts)
        write_json(self.path, self.document)

    def scale(self, item: Item) -> float:
        """Return how much longer jobs take here than estimated: as seen in the item, else by the device."""
        found = [e for e in self.document["results"].get(item.name, {}).values() if e["state"] == MEASURED]
        if found and (estimated := sum(entry["estimate"] for entry in found)):
            return sum(entry["seconds"] for entry in found) / estimated
        rate = self.document["sessions"][-1]["rates"].get("fp16")
        return ESTIMATED_FOR / rate if rate else 1.0

    def round(self, items: Sequence[Item], later: bool, log: Path) -> None:
        """Carry out the open jobs of the first or the second round."""
        for item in items:
            results = self.document["results"].setdefault(item.name, {})
            jobs = [job for job in item.jobs(self.context) if job.later == later]
            worker: Worker | None = None
            try:
                for job in jobs:
                    if results.get(job.name, {}).get("state") == MEASURED:
                        continue
                    if worker is not None and not worker.alive:
                        worker = None
                    need = 0.0 if self.dry_run else job.seconds * self.scale(item) + START * (worker is None)
                    if need > self.left:
                        self.skipped.append(f"{item.name}: {job.name} (about {need:.0f} s)")
                        continue
                    print(f"{item.name}: {job.name}, about {need:.0f} s, {self.left:.0f} s left", flush=True)
                    worker = worker or Worker(log)
                    self.carry_out(item, job, worker, results, need)
            finally:
                if worker is not None:
                    worker.close()

    def carry_out(self, item: Item, job: Job, worker: Worker, results: dict[str, Any], need: float) -> None:
        """Let a worker do a job; write down what came of it, and its parts as they come."""
        limit = self.left if self.dry_run else min(self.left, PATIENCE * need + PATIENCE_SECONDS)
        begun, session = time.monotonic(), len(self.document["sessions"]) - 1
        for state, value in worker.ask(item.run, job.arguments, limit):
            entry = results.setdefault(job.name, {})
            entry |= {"session": session, "state": state, "estimate": job.seconds}
            entry |= {"seconds": round(time.monotonic() - begun, 2), "arguments": dict(job.arguments)}
            if state == FAILED:
                entry["error"] = value
            elif value is not None:
                entry["result"] = value
            write_json(self.path, self.document)
        self.failures += state == FAILED
        if state != MEASURED:
            print(f"{item.name}: {job.name}: {state} {value or ''}", flush=True)


def measure(
    params: Params, out: Path, minutes: float, names: Sequence[str], *, dry_run: bool
) -> tuple[Path, int]:
    """Carry out as much of the sequence as fits; return the page that tells of it, and how many jobs failed.

    Args:
        params: the project's settings.
        out: folder of results; a later call with the same folder goes on.
        minutes: when to stop.
        names: items to carry out; none for all.
        dry_run: tiny sizes on the CPU, Triton interpreted.

    Raises:
        MscsError: there is no GPU, and this is no dry run.
    """
    from benchmarks.gpu_items import ITEMS, hardware
    from benchmarks.gpu_page import write_page

    deadline = time.monotonic() + 60 * minutes
    if dry_run:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    out.mkdir(parents=True, exist_ok=True)
    run, log = Run(params, out.resolve(), deadline, dry_run), out.resolve() / "gpu.log"
    worker = Worker(log)
    for state, facts in worker.ask(hardware, {}, run.left):
        if state != MEASURED:
            raise MscsError(f"PyTorch cannot be used here: {facts or 'no answer'} (see {log})")
    worker.close()
    if not facts["gpu"] and not dry_run:
        raise MscsError(
            "PyTorch sees no GPU here (see `mscs doctor`); --dry-run goes through all of it without"
        )
    run.open(facts)
    items = [item for item in ITEMS if not names or item.name in names]
    try:
        for later in (False, True):
            run.round(items, later, log)
    finally:
        page = write_page(run.context, run.document, run.path, ITEMS, run.skipped)
    return page, run.failures
