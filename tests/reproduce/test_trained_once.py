"""Nothing is trained twice: killed between weights, record and dvc.lock, or trained outside the pipeline."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mscs.params import load_params
from reproduce.pipeline import Pipeline

RUN = "cityscapes-hrnet-hr48-ours-b8-40k"
KILLS = 30
SECONDS = 2.0
"""After the last step, within which the kill comes; writing everything, DVC's lock included, takes less."""


@pytest.fixture(scope="module")
def project(new_pipeline):
    """A copy of the project whose run takes a few steps; everything before its training is done."""

    def shorten(document):
        mini = document["profiles"]["mini"]
        mini["defaults"] |= {"train_images": 8, "val_images": 2}
        # 1600 of the paper's steps are 4 of mini
        mini["runs"][RUN] = {"steps": 1600, "crop_size": [32, 64], "log_every": 1, "checkpoint_every": 2}

    folder = new_pipeline(shorten)
    pipeline = Pipeline(load_params(folder / "params.yaml"))
    repro(folder, pipeline.data_stage("cityscapes")).wait()
    return folder, pipeline.stages_of(RUN)[0]


def repro(folder, stage):
    """Start `dvc repro` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", stage],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def outcome(folder):
    return {
        path.name: path.read_bytes()
        for pattern in ("seed-0.safetensors", "losses.csv", "train.json")
        for path in folder.rglob(pattern)
        if ".dvc" not in path.parts
    }


def forget(folder):
    """Remove every trace of the training."""
    for name in ("work/mini/runs", "work/mini/checkpoints", "results/mini/runs", ".dvc/cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    lock = folder / "dvc.lock"
    lock.write_text((folder / "lock-before").read_text())


@pytest.mark.slow
def test_killed_at_30_moments_of_the_last_second_nothing_is_trained_twice(project):
    folder, stage = project
    shutil.copy(folder / "dvc.lock", folder / "lock-before")
    process = repro(folder, stage)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert re.search(r"step 4/4", text), text
    expected = outcome(folder)
    assert len(expected) == 3
    chance, interrupted = random.Random(0), 0
    for _ in range(KILLS):
        forget(folder)
        process = repro(folder, stage)
        for line in process.stdout:
            if "step 4/4" in line:
                break
        time.sleep(chance.uniform(0, SECONDS))
        interrupted += process.poll() is None
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        again = repro(folder, stage)
        text = again.communicate()[0]
        assert again.returncode == 0, text
        assert "step 1/4" not in text, "it started anew"
        assert "step 2/4" not in text, "it went back beyond the last checkpoint"
        assert outcome(folder) == expected
    assert interrupted >= KILLS // 2, "most kills came too late to interrupt anything"


@pytest.mark.slow
def test_what_was_trained_outside_the_pipeline_is_taken_over(project):
    folder, stage = project
    shutil.copy(folder / "dvc.lock", folder / "lock-before")
    forget(folder)
    settings = ["--settings", "results/mini/resolved.json"]
    for command in ("train", "evaluate"):  # which leaves no checkpoint
        arguments = [sys.executable, "-m", "mscs", command, RUN, *settings]
        subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    expected = outcome(folder)
    process = repro(folder, stage)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert "is trained under these settings" in text
    assert "step 4/4" not in text
    assert outcome(folder) == expected
    assert "didn't change" in repro(folder, stage).communicate()[0]
