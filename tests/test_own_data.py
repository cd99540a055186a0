"""Data, networks and losses of the user's own: the page that tells it, as a script, and what it promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import yaml
from safetensors.torch import save_file

from mscs import modules
from mscs.cli import main
from mscs.datasets import build_dataset
from mscs.datasets.folders import folder_spec
from mscs.errors import MscsError, UsageError
from mscs.params import load_params
from mscs.paths import read_resolved, resolve_all
from mscs.results import write_json

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own-data.md").read_text()
SMALLER = {"crop_size: [512, 512]": "crop_size: [64, 64]", "batch_size: 8": "batch_size: 4"}
SMALLER |= {"steps: 20000": "steps: 3", "validate_every: 1000": "validate_every: 2"}
BACKBONE = "convnext_tiny.fb_in1k"


def block(language):
    [text] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return text


def add_entries(path, entries):
    """Put entries into params.yaml, each under the line that begins the block of its name."""
    text = path.read_text()
    for name, value in entries.items():
        head = re.compile(rf"^{name}:.*\n", re.MULTILINE)
        lines = "".join(f"  {key}: {json.dumps(entry)}\n" for key, entry in value.items()) if name != "profile" else ""
        assert len(head.findall(text)) == 1
        text = head.sub(lambda found: lines and found[0] + lines or f"{name}: {value}\n", text)
    path.write_text(text)


def write_photos(folder, values=(0, 1, 2), ignored=255):
    """Write 8 training and 2 validation images of three stripes, with a border that is ignored."""
    for split, count in (("train", 8), ("val", 2)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            label = np.repeat(np.array(values, np.uint8), 28)[:, None].repeat(96, 1)
            noise = np.random.default_rng(i).integers(0, 40, (84, 96, 3))
            image = (np.searchsorted(values, label)[..., None] * 80 + noise).astype(np.uint8)
            label[:4] = ignored
            cv2.imwrite(str(folder / f"images/{split}/{i}.jpg"), image)
            cv2.imwrite(str(folder / f"labels/{split}/{i}.png"), label)


def fill_cache(folder):
    """Put weights of the page's backbone where the hub's client looks for downloaded ones."""
    repository = folder / f"models--timm--{BACKBONE}"
    for path, text in ((repository / "refs/main", "0" * 40),):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(timm.create_model(BACKBONE).state_dict(), snapshot / "model.safetensors")


@pytest.mark.slow
def test_the_page_as_a_script(copy_project, tmp_path):
    project = copy_project(small=True)
    write_photos(project.parent / "photos")
    fill_cache(tmp_path / "weights")
    text = block("yaml")
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    add_entries(project / "params.yaml", yaml.safe_load(text))
    (project / "mynets.py").write_text(block("python"))
    (tmp_path / "bin").mkdir()
    for name, words in (("python", ""), ("mscs", "-m mscs")):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "MSCS_WEIGHTS": str(tmp_path / "weights"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["sh", "-e", "-c", block("sh")],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    print(done.stdout, done.stderr)
    assert "as it is: " in done.stdout
    assert "step 2 validation mIoU" in done.stdout
    rows = re.findall(r"^paper +(mydata-\S+) +0 +\d", done.stdout, re.MULTILINE)
    assert rows == ["mydata-hrnet-convnext-ce", "mydata-hrnet-convnext-ours"]
    ids = cv2.imread(str(project / "answers/ids/0.png"), cv2.IMREAD_GRAYSCALE)
    assert ids.shape == (84, 96)
    [losses] = project.glob("results/paper/runs/mydata-mynet-spread/seed-0/losses.csv")
    assert "spread" in losses.read_text().splitlines()[0].split(",")
