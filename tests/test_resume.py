"""Runs that are killed or told to stop, as commands: what the next start makes of them."""

import os
import re
import signal
import subprocess
import sys

import pytest

RUN = "cityscapes-hrnet-hr48-ours-b8-40k"
DATA = {"image_size": [64, 96], "train_images": 8, "val_images": 3}  # what `generated` draws
SMALL = {"log_every": 1, "threads": 1, "crop_size": [64, 96], "batch_size": 4, **DATA}
STEPS = 40

# Starts the command as often as it takes, kills it after a random number of steps and a random moment more,
# ten times; then lets it end. The starts are forks, so that PyTorch is imported once.
KILLER = """
import os, random, re, signal, sys, time
import mscs.runs
from mscs.cli import main

kills, chance = 0, random.Random(int(sys.argv[1]))
while True:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, 1)
        os._exit(main(sys.argv[2:]))
    os.close(writer)
    left = chance.randint(1, 3) if kills < 10 else None
    for line in os.fdopen(reader):
        if left is not None and re.search(r" step \\d+/", line):
            left -= 1
            if left == 0:
                time.sleep(chance.uniform(0, 0.2))
                os.kill(child, signal.SIGKILL)
                break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    kills += status == -signal.SIGKILL
    if status != -signal.SIGKILL:
        print(kills, status)
        break
"""


def arguments(root, *extra):
    settings = [f"--set={k}={v}" for k, v in {**SMALL, "steps": STEPS, "checkpoint_every": 3}.items()]
    return ["train", RUN, "--data-root", str(root), *settings, *extra]


@pytest.fixture
def prepare(new_project):
    """Return a function that makes a project of its own and gives the options of a command in it."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return lambda folder: {"cwd": new_project(folder), "env": environment, "text": True}


def weights(folder):
    (found,) = folder.rglob("seed-0.safetensors")
    return found.read_bytes()


@pytest.mark.slow
def test_killed_ten_times_the_weights_are_those_of_an_uninterrupted_run(generated, tmp_path, prepare):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "mscs", *arguments(generated("cityscapes"))]
    assert subprocess.run(command, **prepare(whole), stdout=subprocess.DEVNULL, check=False).returncode == 0
    killer = [sys.executable, "-c", KILLER, "0", *arguments(generated("cityscapes"))]
    done = subprocess.run(killer, **prepare(killed), capture_output=True, check=False)
    assert done.stdout.split() == ["10", "0"], done.stderr
    assert weights(killed) == weights(whole)
    for name in ("losses.csv", "train.json"):
        (ours,), (theirs,) = killed.rglob(name), whole.rglob(name)
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_a_signal_saves_and_the_next_start_goes_on(
    generated, tmp_path, prepare, signum, code, processes, workers
):
    """One process is told with its whole group, readers included, as a terminal or scheduler does."""
    options = prepare(tmp_path / "run")
    extra = ["--processes", str(processes), "--workers", str(workers), "--device", "cpu"]
    command = [sys.executable, "-m", "mscs", *arguments(generated("cityscapes"), *extra)]
    process = subprocess.Popen(
        command, **options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    for line in process.stdout:
        if f"step 4/{STEPS}" in line:
            if processes == 1:
                os.killpg(process.pid, signum)
            else:
                process.send_signal(signum)
            break
    rest, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "goes on from there" in error
    stopped = int(re.search(r"after step (\d+)", error)[1])
    assert f"step {STEPS}/" not in rest
    if processes == 1:
        done = subprocess.run(command, **options, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"going on from step {stopped}" in done.stdout


SWALLOWED = """
import os, signal, time
from mscs.command_line import loading
with loading():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:  # as an import in a library may
        pass
print("went on")
"""


def test_an_interrupt_while_modules_load_cannot_be_swallowed():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
