"""Small generated data and settings that several test files share."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
SMALLER = {"train_images": 8, "val_images": 2, "steps_factor": 0.0001, "checkpoint_every": 2}  # in mini


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """Return a function that draws a small dataset once and gives its folder."""
    from mscs.datasets.toy import write_dataset

    roots: dict[str, Path] = {}

    def draw(name: str) -> Path:
        if name not in roots:
            root = tmp_path_factory.mktemp("data") / name
            write_dataset(name, root, train=8, val=3, image_size=(64, 96))
            roots[name] = root
        return roots[name]

    return draw


@pytest.fixture(scope="session")
def params():
    from mscs.params import load_params

    return load_params(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def new_project():
    """Return a function that makes a folder with the project's settings, ready to train in."""

    def make(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        for name in ("params.yaml", "numerics.yaml"):
            shutil.copy(ROOT / name, folder / name)
        return folder

    return make


@pytest.fixture
def project(new_project, tmp_path, monkeypatch):
    """Return an empty project of its own, which is the current folder."""
    monkeypatch.chdir(new_project(tmp_path / "project"))
    return Path.cwd()


@pytest.fixture(scope="session")
def new_pipeline(tmp_path_factory):
    """Return a function that copies the code into a folder without git and writes a pipeline there.

    It takes what changes the parsed params.yaml, and what else there is to do in the folder before.
    """

    def make(change, prepare=lambda folder: None) -> Path:
        folder = tmp_path_factory.mktemp("pipeline") / "project"
        for name in ("mscs", "reproduce"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "dvc.*"))
        shutil.copy(ROOT / "numerics.yaml", folder)
        document = yaml.safe_load((ROOT / "params.yaml").read_text())
        change(document)
        (folder / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        (folder / ".venv").symlink_to(sys.prefix)
        prepare(folder)
        for command in (["dvc", "init", "--no-scm", "-q"], ["reproduce", "pipeline"]):
            subprocess.run([sys.executable, "-m", *command], cwd=folder, check=True)
        return folder

    return make


@pytest.fixture(scope="session")
def copy_project(tmp_path_factory):
    """Return a function that commits a copy of the project's files to a repository of its own.

    `small` cuts mini down further, and leaves out results and what speaks of them.
    """

    def copy(small: bool) -> Path:
        folder = tmp_path_factory.mktemp("copy") / "project"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
        left_out = ("results/", "docs/", "dvc.lock", "reproduce/rows/dvc.lock") if small else ()
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file() and not name.startswith(left_out):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        if small:
            rest, mini = (folder / "params.yaml").read_text().split("\n  mini:", 1)
            for key, value in SMALLER.items():
                mini, changes = re.subn(rf"( {key}:) \S+", rf"\1 {value}", mini, count=1)
                assert changes == 1, key
            (folder / "params.yaml").write_text(f"{rest}\n  mini:{mini}")
        git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "copy"]):
            subprocess.run([*git, *command], check=True)
        return folder

    return copy
