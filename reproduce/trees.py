"""Two trees of this project's files: do they train, score, resolve settings, write tables and refuse alike?

One tree is a revision, the other the working tree (or the working tree under another interpreter). Both run
the same commands on the same data, each in a folder of its own. Numbers stored in files would fail on another
processor; a comparison of two trees does not.
"""

import csv
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mscs.errors import MscsError, UsageError
from mscs.results import read_json
from reproduce.compare import resolve_commit

PROFILE = "mini"
RELATIVE, ABSOLUTE = 1e-9, 1e-14
LISTS = Path("reproduce/trees.yaml")
OWN = {"work", "results", "data", ".git", ".venv"}
"""What a tree's folder does not take over from the project's."""
SHORT = {
    "precision": "fp64",
    "steps": 3,
    "warmup_steps": 1,  # so that the rest of the schedule counts too
    "log_every": 1,
    "threads": 1,
    "seeds": "[0]",
    "evaluation": "[ss,ms]",
    "train_images": 8,
    "val_images": 2,
}
"""Settings of a short training and its evaluation."""
IMAGES = {"--train": SHORT["train_images"], "--val": SHORT["val_images"]}
PARAMS = "reference.yaml"

DRIVER = """
import contextlib, io, json, runpy, sys, traceback
outcomes = []
for arguments in json.load(sys.stdin):
    sys.argv = arguments
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(arguments[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            code = 1
            traceback.print_exc()
    outcomes.append([code, out.getvalue(), err.getvalue()])
json.dump(outcomes, sys.stdout)
"""
"""Runs command lines, one after the other, in one process: importing PyTorch takes seconds."""


@dataclass(frozen=True)
class Finding:
    """One place where two trees differ; None stands for absent."""

    where: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.where}\n  was {self.old!r}\n  is  {self.new!r}"


@dataclass(frozen=True)
class Tree:
    """The project's files under `source`, and the interpreter that runs them."""

    source: Path
    python: str = sys.executable

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Give a new folder that looks like the project's, with `work` and `results` of its own."""
        with tempfile.TemporaryDirectory(prefix="mscs-tree-") as name:
            for path in self.source.iterdir():
                if path.name not in OWN:
                    (Path(name) / path.name).symlink_to(path.resolve())
            yield Path(name)

    def run(
        self, folder: Path, commands: Sequence[Sequence[str]], *, refusals: bool = False
    ) -> list[tuple[int, str, str]]:
        """Run command lines of mscs and reproduce in `folder`; return exit codes, stdout and stderr.

        Raises MscsError where one fails, unless `refusals` are what is asked for.
        """
        done = subprocess.run(
            [self.python, "-c", DRIVER],
            input=json.dumps([list(command) for command in commands]),
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise MscsError(f"{self.source}: commands could not be run: {done.stderr.strip()}")
        outcomes = [(code, out, err.strip()) for code, out, err in json.loads(done.stdout)]
        for command, (code, _, err) in zip(commands, outcomes, strict=True):
            if code and not refusals:
                raise MscsError(f"{self.source}: `{' '.join(command)}` failed: {err}")
        return outcomes


def git(*arguments: str) -> str:
    """Return what git prints; MscsError with its message where it fails."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MscsError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Give the files of a revision in a temporary folder (a git worktree would outlive a killed process)."""
    with tempfile.TemporaryDirectory(prefix="mscs-revision-") as folder:
        archive = ["git", "archive", "--format=zip", resolve_commit(revision)]
        data = subprocess.run(archive, capture_output=True, check=True).stdout
        zipfile.ZipFile(io.BytesIO(data)).extractall(folder)
        yield Path(folder)


def shown(tree: Tree, *choices: str) -> dict[str, dict[str, Any]]:
    """Return the settings of every run, flat as `mscs show RUN CHOICES --json` prints them."""
    runs = list(yaml.safe_load((tree.source / "params.yaml").read_text())["runs"])
    with tree.folder() as folder:
        outcomes = tree.run(folder, [["mscs", "show", run, "--json", *choices] for run in runs])
    found = {run: json.loads(text) for run, (_, text, _) in zip(runs, outcomes, strict=True)}
    for values in found.values():
        del values["sources"]
    return found


def settings_of_all(tree: Tree) -> dict[str, Any]:
    """Return the settings of all runs under all profiles and recipes."""
    document = yaml.safe_load((tree.source / "params.yaml").read_text())
    choices = [(profile, recipe) for profile in document["profiles"] for recipe in document["recipes"]]
    return {f"{p} {r}": shown(tree, "--profile", p, "--set", f"recipe={r}") for p, r in choices}


def tables(tree: Tree, results: Path) -> dict[str, str]:
    """Return the text of all table files that a tree makes from `results`."""
    with tree.folder() as folder:
        target = folder / "results" / PROFILE
        target.mkdir(parents=True)
        for path in (results / PROFILE).iterdir():
            if path.name != "tables":
                (target / path.name).symlink_to(path.resolve())
        tree.run(folder, [["reproduce", "tables", "--profile", PROFILE]])
        return {path.name: path.read_text() for path in sorted((target / "tables").iterdir())}


def refusals(tree: Tree) -> dict[str, str]:
    """Return exit code and last line on stderr for each of the listed mistakes."""
    lines = yaml.safe_load(LISTS.read_text())["mistakes"]
    with tree.folder() as folder:
        text = (folder / "params.yaml").read_text()
        (folder / "broken.yaml").write_text("profile: [mini\n")
        (folder / "key.yaml").write_text(text.replace("\n  hflip: 0.5", "\n  hflop: 0.5", 1))
        (folder / "value.yaml").write_text(text.replace("\n  hflip: 0.5", "\n  hflip: often", 1))
        (folder / "damaged.safetensors").write_bytes(b"no weights at all")
        (folder / "empty").mkdir()
        scenes = "mscs data synth cityscapes --root scenes --train 1 --val 1 --size 64 128"
        tree.run(folder, [scenes.split(" ")])
        outcomes = tree.run(folder, [line.split(" ") for line in lines], refusals=True)
        answers = [f"exit code {code}: {(err.splitlines() or [''])[-1]}" for code, _, err in outcomes]
        answers = [text.replace(str(folder), ".") for text in answers]
    return dict(zip(lines, answers, strict=True))


def cases(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one run per architecture, loss, projector and optimiser, spread over the datasets.

    `settings` are those of the runs to choose from, as `shown` returns them.
    """
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for run, values in settings.items():
        key = tuple(values[name] for name in ("model", "loss", "projector", "optimizer"))
        kinds.setdefault(key, []).append(run)
    used: Counter[str] = Counter()
    chosen = []
    for runs in kinds.values():
        chosen.append(min(runs, key=lambda run: used[settings[run]["dataset"]]))
        used[settings[chosen[-1]]["dataset"]] += 1
    return chosen


def short_training(tree: Tree, run: str, data: Path, params: str) -> dict[str, Any]:
    """Train and evaluate one run of `params` for a few steps; return all that it wrote except times."""
    from safetensors.numpy import load_file

    options = ["--params", PARAMS, "--profile", PROFILE, "--data-root", str(data), "--device", "cpu"]
    options += [text for key, value in SHORT.items() for text in ("--set", f"{key}={value}")]
    with tree.folder() as folder:
        (folder / PARAMS).write_text(params)
        tree.run(folder, [["mscs", verb, run, *options] for verb in ("train", "evaluate")])
        [scores] = (folder / "results" / PROFILE / "runs").rglob("evaluation.json")
        results = scores.parent
        [weights] = (folder / "work" / PROFILE / "runs").glob("*/weights/*.safetensors")
        with (results / "losses.csv").open() as file:
            losses = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        names = ("train.json", "evaluation.json", "confusion.json")
        written = {name: read_json(results / name) for name in names}
        return {**written, "losses.csv": losses, "weights": load_file(weights)}


def compare_trainings(pair: tuple[Tree, Tree], runs: Sequence[str] | None = None) -> list[Finding]:
    """Return where the short trainings of `runs` (default: `cases`) differ between two trees.

    Data are drawn once, and params.yaml is taken from the first tree: generated scenes and profile mini may
    change without touching the numerics.
    """
    params = (pair[0].source / "params.yaml").read_text()
    settings = shown(pair[0], "--profile", PROFILE)
    runs = cases(settings) if runs is None else runs
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="mscs-data-") as data:
        for number, run in enumerate(runs, start=1):
            if run not in settings:
                raise UsageError(f"the older tree has no run {run!r}; compare others with --cases")
            root = Path(data) / settings[run]["dataset"]
            if not root.exists():
                counts = [text for item in IMAGES.items() for text in map(str, item)]
                size = ["--size", *map(str, settings[run]["image_size"])]
                command = ["mscs", "data", "synth", root.name, "--root", str(root), *counts, *size]
                with pair[0].folder() as folder:
                    pair[0].run(folder, [command])
            found = _differences_of(pair, partial(short_training, run=run, data=root, params=params), run)
            print(f"{number}/{len(runs)} {run}: {len(found)} differences", file=sys.stderr, flush=True)
            findings += found
    return findings


def compare_trees(revision: str, runs: Sequence[str] | None) -> tuple[list[Finding], dict[str, int]]:
    """Compare a revision with the working tree in all respects, or in the trainings of `runs` alone.

    Returns what is not meant to differ, and of each entry of `intended` in reproduce/trees.yaml how many
    differences it explains.
    """
    with checkout(revision) as source:
        pair = Tree(source), Tree(Path.cwd())
        findings = []
        if runs is None:
            findings += _differences_of(pair, settings_of_all, "show")
            findings += _differences_of(pair, partial(tables, results=source / "results"), "tables")
            findings += _differences_of(pair, refusals, "mistakes")
        findings += compare_trainings(pair, runs)
    intended = dict.fromkeys(yaml.safe_load(LISTS.read_text())["intended"] or {}, 0)
    unexpected = []
    for finding in findings:
        place = finding.where
        pattern = next((entry for entry in intended if fnmatchcase(place, entry.replace("[", "[[]"))), None)
        if pattern is None:
            unexpected.append(finding)
        else:
            intended[pattern] += 1
    return unexpected, intended


def _differences_of(pair: tuple[Tree, Tree], ask: Callable[[Tree], Any], where: str) -> list[Finding]:
    with ThreadPoolExecutor(2) as pool:
        old, new = pool.map(ask, pair)
    return list(differences(old, new, where))


def differences(old: Any, new: Any, where: str) -> Iterator[Finding]:
    """Yield where two results differ: numbers by 1e-9 of the larger, arrays of the largest entry."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{where}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{where}/{i}")
    elif hasattr(old, "dtype") and hasattr(new, "dtype"):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            yield Finding(where, f"{old.dtype} {old.shape}", f"{new.dtype} {new.shape}")
        elif old.size and not abs(old - new).max() <= RELATIVE * abs(old).max():
            worst = abs(old - new).argmax()
            yield Finding(where, float(old.flat[worst]), float(new.flat[worst]))
    elif not _equal(old, new):
        yield Finding(where, old, new)


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=RELATIVE, abs_tol=ABSOLUTE) or (old != old and new != new)
    return type(old) is type(new) and old == new
