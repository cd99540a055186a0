"""A pipeline stage as a Slurm job (MSCS_RUNTIME=slurm): submitted, followed, found again.

Each stage is a job under a name made of the stage and a digest of what it depends on. Job arrays and
dependencies between jobs are not used, because DVC knows what is stale; nor is submitit, because it finds no
job by its name.

A job works in a folder of its own, work/slurm/NAME, since DVC removes the outputs of a stage before it starts
the stage again, even while a job that a killed command has left is at work. Code and settings are copied
there, so that a job that waits for days runs what was submitted; all else is linked. Files that are no links
after the job are its results. Its exit code, written last, says that it has ended: Slurm forgets its jobs.
"""

import functools
import hashlib
import itertools
import json
import math
import operator
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mscs.errors import MscsError
from mscs.locks import check_shared
from mscs.params import load_params
from mscs.paths import RESULTS, WORK, read_resolved, resolved_path
from mscs.results import atomic_path, file_sha256, read_json, write_text
from reproduce.pipeline import Pipeline
from reproduce.plan import hours_on_slowest_gpu
from reproduce.runtime import commit_variable, handling, mounts, stage_name, weights_folder

CPUS_PER_GPU, GIB_PER_GPU = 8, 32
SAVING_SECONDS = 180
"""How long before its time is up a job is told to save; it then waits for another turn."""
LOOK_SECONDS, ASK_SECONDS = 2.0, 60.0
"""How often a job's files are looked at, and how often Slurm is asked about it."""

SCRIPT = """\
#!/bin/bash
cd {tree} || exit 1
rm -f ../exit
end() {{ echo "$1" > ../exit.part && mv ../exit.part ../exit; exit "$1"; }}
[ ! -e ../cancel ] || end 143
[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || unset MSCS_FRESH
{command} &
trap 'stopped=1; kill -TERM $!' TERM
wait $!; code=$?
[ -z "$stopped" ] || {{ wait $!; code=$?; }}
# stopped by Slurm because its time is up: another turn, unless Slurm is ending or moving the job itself
if [ $code = 143 ] && [ ! -e ../cancel ]; then
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ] || scontrol requeue "$SLURM_JOB_ID"
  exit 143
fi
end $code
"""


def run_as_job(verb: str, profile: str, names: Sequence[str]) -> int:
    """Run one stage as a job, or go on with the one that is there; return its exit code."""
    for place in (Path.cwd(), WORK, RESULTS):
        check_shared(place)
    name = f"{stage_name(verb, profile, names, Path.cwd())}-{digest(verb, profile, names)}"
    folder = (WORK / "slurm" / name).absolute()
    job, state, _ = find(name)
    while exit_code(folder) != 0 and (state == "COMPLETING" or (state == "RUNNING" and exit_code(folder))):
        time.sleep(LOOK_SECONDS)  # cancelled or failed, and about to leave the queue
        job, state, _ = find(name)
    if job or exit_code(folder) == 0:
        print(f"{name}: goes on as job {job}" if job else f"{name}: had ended", file=sys.stderr)
    else:
        prepare(folder, profile)
        inside = command(verb, profile, names, folder / "tree")
        write_text(folder / "script", SCRIPT.format(tree=shlex.quote(str(folder / "tree")), command=inside))
        job = submit(folder, name, resources(verb, profile, names))
        print(f"{name}: job {job}", file=sys.stderr)
    code = follow(folder, name, job)
    if code == 0:
        bring_home(folder / "tree")
        gone = folder.with_name(f".{name}")  # first under another name: half of it would look like a job
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)
    return code


def digest(verb: str, profile: str, names: Sequence[str]) -> str:
    """Return a short digest of what DVC makes the stage's hash of, and of MSCS_FRESH."""
    command = " ".join(("reproduce/stage", verb, profile, *names))
    files, params = _inputs(Pipeline(load_params(), profile), command)
    parts = [command, os.environ.get("MSCS_FRESH")]
    parts += [file_sha256(file) if Path(file).is_file() else None for file in files]
    for file, keys in (pair for group in params for pair in group.items()):
        parts += [functools.reduce(operator.getitem, key.split("."), read_json(file)) for key in keys]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _inputs(pipeline: Pipeline, command: str) -> tuple[list[str], list[dict[str, list[str]]]]:
    """Return the files and the parameters that the stage with this command depends on."""
    for stage in (stage for file in pipeline.files().values() for stage in file["stages"].values()):
        body, axes = stage.get("do", stage), stage.get("matrix", {})
        combined = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        for item in stage.get("foreach", {}).values() or combined:
            text = json.dumps([body["cmd"], body["deps"], body.get("params", [])])
            for axis, value in item.items():
                text = text.replace(f"${{item.{axis}}}", value)
            found, files, params = json.loads(text)
            if found == command:
                return files, params
    raise MscsError(f"no stage `{command}`; `python -m reproduce pipeline` writes the pipeline anew")


def prepare(folder: Path, profile: str) -> None:
    """Make the folder that a job works in."""
    shutil.rmtree(folder, ignore_errors=True)
    tree = folder / "tree"
    for place in (tree / WORK / profile, WORK / profile / "data", WORK / profile / "checkpoints"):
        place.mkdir(parents=True, exist_ok=True)
    for path in Path.cwd().iterdir():
        if path.name in ("mscs", "reproduce"):
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.suffix == ".yaml":
            shutil.copy(path, tree)
        elif path.name not in (WORK.name, RESULTS.name, ".git"):
            (tree / path.name).symlink_to(path)
    for path in (WORK / profile).iterdir():
        if path.name != "runs":
            (tree / path).symlink_to(path.absolute())
    for source in (WORK / profile / "runs", RESULTS / profile):
        if source.is_dir():
            shutil.copytree(source.absolute(), tree / source, copy_function=os.symlink)
    settings = resolved_path(profile)
    (tree / settings).unlink()
    shutil.copy(settings, tree / settings)
    for name in ("out", "err"):
        (folder / name).touch()


def bring_home(tree: Path) -> None:
    """Copy what a job has made into the project; nothing is removed before all of it is there."""
    for base in (WORK, RESULTS):
        for path in sorted((tree / base).rglob("*")):
            made = path.is_file() and not path.is_symlink() and path.suffix != ".lock"
            if made and path.name != resolved_path("").name:
                with atomic_path(path.relative_to(tree)) as temporary:
                    shutil.copyfile(path, temporary)


def command(verb: str, profile: str, names: Sequence[str], tree: Path) -> str:
    """Return the shell command of a stage: in the image $MSCS_APPTAINER, or natively."""
    image = os.environ.get("MSCS_APPTAINER")
    if not image:
        return shlex.join(["reproduce/stage", verb, profile, *names])
    binds = [f"--bind={path}:{path}:{mode}" for path, mode in mounts(Path.cwd()).items()]
    variables = commit_variable() | {"MSCS_IMAGE": image, "MSCS_WEIGHTS": str(weights_folder())}
    inside = [f"--env={key}={value}" for key, value in variables.items()]
    start = ["apptainer", "exec", "--nv", *binds, *inside, f"--pwd={tree}", str(Path(image).absolute())]
    return shlex.join([*start, "python", "-m", "reproduce.stages", verb, profile, *names])


def resources(verb: str, profile: str, names: Sequence[str]) -> list[str]:
    """Return what a stage of profile paper asks for: a training a GPU per group of images, all else one."""
    if profile != "paper":
        return []
    gpus, hours = 1, None
    if verb == "train":
        settings = read_resolved(resolved_path(profile), names[0])
        gpus = settings.schedule.groups // settings.schedule.accumulation_steps
        hours = hours_on_slowest_gpu(settings)
    options = [f"--gres=gpu:{gpus}", f"--cpus-per-task={CPUS_PER_GPU * gpus}", f"--mem={GIB_PER_GPU * gpus}G"]
    # with a margin; a job whose time is up saves and waits for another turn
    return options if hours is None else [*options, f"--time={60 * math.ceil(1.5 * hours / gpus + 1)}"]


def submit(folder: Path, name: str, asked: Sequence[str]) -> str:
    """Submit the script in `folder`; return the job's number. Options in $MSCS_SBATCH come last and win."""
    options = [f"--job-name={name}", f"--output={folder}/out", f"--error={folder}/err", "--open-mode=append"]
    options += ["--export=ALL", "--nodes=1", "--ntasks=1", "--requeue", f"--signal=B:TERM@{SAVING_SECONDS}"]
    own = shlex.split(os.environ.get("MSCS_SBATCH", ""))
    environment = os.environ | commit_variable() | {"MSCS_RUNTIME": "native"}
    if "MSCS_DATA" in environment:
        environment["MSCS_DATA"] = str(Path(environment["MSCS_DATA"]).absolute())
    line = ["sbatch", "--parsable", *options, *asked, *own, str(folder / "script")]
    return _slurm(line, environment).strip().split(";")[0]


def find(name: str) -> tuple[str, str, str]:
    """Return (number, state, reason) of the job of this name that waits or runs, else empty texts."""
    line = ["squeue", "--noheader", f"--user={os.getuid()}", f"--name={name}", "--format=%A|%T|%r"]
    job, state, reason = [*(_slurm(line).splitlines() or ["||"])[0].split("|", 2)]
    return job, state, reason


def _slurm(line: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Return what a command of Slurm prints; MscsError if it fails."""
    try:
        return subprocess.run(line, env=environment, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise MscsError(f"there is no {line[0]} here; start this on a login node of the cluster") from None
    except subprocess.CalledProcessError as error:
        hint = "; options of your cluster go into MSCS_SBATCH" if line[0] == "sbatch" else ""
        raise MscsError(f"{line[0]} says: {error.stderr.strip()}{hint}") from None


def exit_code(folder: Path) -> int | None:
    """Return the exit code of a job that has ended, which it wrote last."""
    with suppress(FileNotFoundError, ValueError):  # an empty one is of a full disk
        return int((folder / "exit").read_text())
    return None


def follow(folder: Path, name: str, job: str) -> int:
    """Copy a job's output here until it ends; return its exit code, or 128 + signal if it was cancelled.

    SIGINT and SIGTERM cancel: the job saves first; at a second signal Slurm ends it. A lost terminal (SIGHUP)
    and the end of the calling process end this one alone; the next command finds the job by its name.
    """
    received: list[int] = []
    wake = threading.Event()

    def cancel(number: int) -> None:
        received.append(number)
        (folder / "cancel").touch()
        saving = (["--state=PENDING"], ["--batch", "--signal=TERM"])
        for options in saving if len(received) == 1 else ([],):
            subprocess.run(["scancel", "--quiet", *options, job], check=False)
        wake.set()

    parent, asked, told = os.getppid(), -math.inf, ""
    missing: float | None = None
    with (
        handling((signal.SIGINT, signal.SIGTERM), cancel),
        (folder / "out").open("rb") as out,
        (folder / "err").open("rb") as err,
    ):
        while True:
            code = exit_code(folder)  # first, so that what was printed before the end is seen
            for file, stream in ((out, sys.stdout), (err, sys.stderr)):
                shutil.copyfileobj(file, stream.buffer)
                stream.flush()
            if code is not None:
                return 128 + received[0] if received and code else code
            if os.getppid() != parent:
                raise MscsError(f"{name}: the command that asked for it is gone; job {job} goes on")
            now = time.monotonic()
            if now - asked >= (ASK_SECONDS if missing is None and not received else LOOK_SECONDS):
                asked = now
                with suppress(MscsError):  # Slurm's controller may be away for a while
                    found, state, reason = find(name)
                    missing = None if found else missing or now
                    if found and state != told:
                        print(f"{name}: {state} ({reason})", file=sys.stderr)
                        told = state
            if missing is not None and received:
                return 128 + received[0]
            if missing is not None and now - missing > ASK_SECONDS:  # network file systems show files late
                raise MscsError(
                    f"{name}: job {job} left no exit code; Slurm says: {ending(job)}. Its output is in "
                    f"{folder}; the same command submits it again and goes on from the last checkpoint"
                )
            wake.wait(LOOK_SECONDS)
            wake.clear()


def ending(job: str) -> str:
    """Return how a job ended, as far as Slurm still knows."""
    for line in (["sacct", "-nXP", "-o", "State", "-j", job], ["scontrol", "-o", "show", "job", job]):
        with suppress(MscsError):
            if found := re.search(r"(?:^|\bJobState=)([A-Z_]+)", _slurm(line)):
                return found[1]
    return "nothing any more"
