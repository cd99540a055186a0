"""Two trees of this project's files: do they train, score, resolve settings and answer alike?

One tree is a commit, the other the working tree (or the working tree under another interpreter). Both run
the same command lines on the same data, each in a folder of its own. Numbers stored in files would fail on
another processor; a comparison of two trees does not.
"""

import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mscs.errors import MscsError
from mscs.params import Params, load_params
from mscs.results import read_json
from mscs.settings import Settings
from reproduce.revisions import checkout, differences, find_commit

PROFILE = "mini"
RELATIVE, ABSOLUTE = 1e-9, 1e-14
LISTS = Path("reproduce/trees.yaml")
OWN = {"work", "results", "data", ".git", ".venv"}
"""What a tree's folder does not take over from the project's."""
TRAIN, VAL = 8, 2  # images
SHORT = {
    "precision": "fp64",
    "steps": 3,
    "warmup_steps": 1,  # so that the rest of the schedule counts too
    "log_every": 1,
    "threads": 1,
    "seeds": [0],
    "evaluation": ["ss", "ms"],
    "train_images": TRAIN,
    "val_images": VAL,
}
"""Settings of a short training and its evaluation."""
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
    outcomes.append([code, out.getvalue(), err.getvalue().strip()])
json.dump(outcomes, sys.stdout)
"""
"""Runs command lines, one after the other, in one process: importing PyTorch takes seconds."""

Found = dict[str, list[Any]]
"""Where two trees differ: place -> the older and the newer value, as `differences` gives them."""


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

    def run(self, folder: Path, commands: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
        """Run command lines of mscs and reproduce in `folder`; return exit codes, stdout and stderr."""
        done = subprocess.run(
            [self.python, "-c", DRIVER],
            input=json.dumps(commands),
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise MscsError(f"{self.source}: commands could not be run: {done.stderr.strip()}")
        return [(code, out, err) for code, out, err in json.loads(done.stdout)]


def cases(params: Params, runs: Sequence[str]) -> list[str]:
    """Return one of `runs` per architecture, loss, projector and optimiser, spread over the datasets."""
    kinds: dict[tuple[Any, ...], list[Settings]] = {}
    for settings in (params.resolve(run, PROFILE).settings for run in runs):
        loss, optimizer = settings.loss, settings.schedule.optimizer.name
        kinds.setdefault((settings.model.name, loss.name, loss.projector, optimizer), []).append(settings)
    used: Counter[str] = Counter()
    chosen = []
    for candidates in kinds.values():
        settings = min(candidates, key=lambda one: used[one.data.name])
        used[settings.data.name] += 1
        chosen.append(settings.run)
    return chosen


def compare_trainings(pair: tuple[Tree, Tree], params: Params, runs: Sequence[str]) -> Found:
    """Return where short trainings of `runs` differ between two trees.

    Data are drawn once, and params.yaml is taken from the first tree: generated scenes and profile mini may
    change without touching the numerics.
    """
    from mscs.datasets.toy import write_dataset

    reference = (pair[0].source / "params.yaml").read_text()
    found: Found = {}
    with tempfile.TemporaryDirectory(prefix="mscs-data-") as data:
        for number, run in enumerate(runs, start=1):
            scenes = params.resolve(run, PROFILE).settings.data
            root = Path(data, scenes.name)
            if not root.exists():
                write_dataset(scenes.name, root, train=TRAIN, val=VAL, image_size=scenes.image_size)
            options = ["--params", PARAMS, "--profile", PROFILE, "--data-root", str(root), "--device", "cpu"]
            for key, value in {**SHORT, "image_size": scenes.image_size}.items():
                options += [
                    "--set",
                    f"{key}={json.dumps(value) if isinstance(value, list | tuple) else value}",
                ]
            commands = [["mscs", verb, run, *options] for verb in ("train", "evaluate")]
            differ = _compare(pair, partial(_trained, commands=commands, params=reference), run)
            print(f"{number}/{len(runs)} {run}: {len(differ)} differences", file=sys.stderr, flush=True)
            found |= differ
    return found


def _trained(tree: Tree, commands: list[list[str]], params: str) -> dict[str, Any]:
    """Train and evaluate; return all that was written except times."""
    from safetensors.numpy import load_file

    with tree.folder() as folder:
        (folder / PARAMS).write_text(params)
        for command, (code, _, err) in zip(commands, tree.run(folder, commands), strict=True):
            if code:
                raise MscsError(f"{tree.source}: `{' '.join(command)}` failed: {err}")
        # an evaluation that was asked for differently lies in a folder of its own
        written = {path.name: path for path in (folder / "results" / PROFILE / "runs").rglob("*.*")}
        names = ("train.json", "evaluation.json", "confusion.json")
        found = {name: read_json(written[name]) for name in names}
        for key in ("digest", "numerics", "evaluation"):  # they tell what the scores are of
            found["evaluation.json"].pop(key, None)
        with written["losses.csv"].open() as file:
            rows = list(csv.DictReader(file))
        losses = {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}
        [weights] = (folder / "work" / PROFILE / "runs").glob("*/weights/*.safetensors")
        return {**found, "losses.csv": losses, "weights": load_file(weights)}


def answers(tree: Tree, results: Path, runs: Sequence[str]) -> dict[str, Any]:
    """Return what a tree answers to the listed command lines, and the settings that it shows of `runs`.

    An answer is the printed JSON, or exit code and last line on stderr. `results`: those of the tables.
    """
    document = yaml.safe_load((tree.source / "params.yaml").read_text())
    choices = itertools.product(runs, document["profiles"], document["recipes"])
    shown = [f"mscs show {run} --json --profile {p} --set recipe={recipe}" for run, p, recipe in choices]
    lists = yaml.safe_load(LISTS.read_text())
    lines = [*lists["commands"], *lists["mistakes"], *shown]
    with tree.folder() as folder:
        text = (folder / "params.yaml").read_text()
        (folder / "broken.yaml").write_text("profile: [mini\n")
        (folder / "key.yaml").write_text(text.replace("\n  hflip: 0.5", "\n  hflop: 0.5", 1))
        (folder / "value.yaml").write_text(text.replace("\n  hflip: 0.5", "\n  hflip: often", 1))
        (folder / "damaged.safetensors").write_bytes(b"no weights at all")
        (folder / "empty").mkdir()
        (folder / "results" / PROFILE).mkdir(parents=True)
        for path in (results / PROFILE).iterdir():
            (folder / "results" / PROFILE / path.name).symlink_to(path.resolve())
        outcomes = tree.run(folder, [line.split(" ") for line in lines])
    found: dict[str, Any] = {}
    for line, (code, out, err) in zip(lines, outcomes, strict=True):
        found[line] = f"exit code {code}: {(err.splitlines() or [''])[-1]}".replace(str(folder), ".")
        if "--json" in line and not code:
            found[line] = json.loads(out)
            if isinstance(found[line], dict):
                found[line].pop("sources", None)  # texts
    return found


def compare_trees(revision: str, runs: Sequence[str] | None) -> tuple[Found, dict[str, int]]:
    """Compare a revision with the working tree in all respects, or in the trainings of `runs` alone.

    Returns what is not meant to differ, and of each entry of `intended` in reproduce/trees.yaml how many
    differences it explains.
    """
    params = load_params()
    found: Found = {}
    with checkout(find_commit(revision)) as source:
        pair = Tree(source), Tree(Path.cwd())
        if runs is None:
            found |= _compare(pair, lambda tree: answers(tree, source / "results", params.runs), "answers")
            runs = cases(params, params.runs)
        found |= compare_trainings(pair, params, runs)
    intended = dict.fromkeys(yaml.safe_load(LISTS.read_text())["intended"] or {}, 0)
    unexpected = {}
    for place, values in found.items():
        pattern = next((entry for entry in intended if fnmatchcase(place, entry.replace("[", "[[]"))), None)
        if pattern is None:
            unexpected[place] = values
        else:
            intended[pattern] += 1
    return unexpected, intended


def _compare(pair: tuple[Tree, Tree], ask: Callable[[Tree], Any], where: str) -> Found:
    with ThreadPoolExecutor(2) as pool:
        old, new = pool.map(ask, pair)
    return differences(old, new, where, alike)


def alike(old: Any, new: Any) -> bool:
    """Return whether two values are the same: numbers by 1e-9 of the larger, arrays of the largest entry."""
    if isinstance(old, float) and isinstance(new, float):
        return bool(np.isclose(old, new, RELATIVE, ABSOLUTE, equal_nan=True))
    if isinstance(old, dict) and isinstance(new, dict):
        return not differences(old, new, same=alike)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(alike, old, new))
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return False
        return not old.size or bool(abs(old - new).max() <= RELATIVE * abs(old).max())
    return type(old) is type(new) and old == new


def described(place: str, old: Any, new: Any) -> str:
    """Return a difference as text; of two arrays the entry that differs most."""
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray) and old.shape == new.shape:
        worst = abs(old - new).argmax()
        old, new = float(old.flat[worst]), float(new.flat[worst])
    return f"{place}\n  was {old!r:.500}\n  is  {new!r:.500}"
