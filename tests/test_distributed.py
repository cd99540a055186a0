"""Several processes: the same model, a lost worker, two nodes."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mscs.distributed import World, is_lost_peer

RUN = "cityscapes-hrnet-hr48-ours-b8-40k"
DATA = {"image_size": [64, 96], "train_images": 8, "val_images": 3}  # what `generated` draws
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# float64, so that the order of sums is all that may differ; no dropout and no drop-path, whose masks differ
SCRIPT = """
import sys, torch
from pathlib import Path
from mscs import build
from mscs.distributed import join_world
from mscs.params import load_params
from mscs.train import Trainer

run, root, folder = sys.argv[1:4]
params = load_params()
options = {"head_channels": 16, "projector_channels": 16} if "hrnet" in run else {
    "channels": 16, "aux_channels": 8, "dropout": 0.0, "drop_path_rate": 0.0, "projector_channels": 16}
settings = params.resolve(run, "mini", {
    "steps": 12, "log_every": 1, "batch_size": 8, "threads": 1, "crop_size": [64, 64], "image_size": [64, 96],
    "lr": 0.001, "precision": "fp64", "model_options": options}).settings
build.apply_machine_settings(settings)
with join_world("cpu") as world:
    folder = Path(folder) / str(world.size)
    job = Trainer(settings, 0, world, build.open_dataset(settings, "train", Path(root)), folder)
    weights = job.train()
    if world.is_main:
        torch.save({"weights": weights, "history": job.history, "sessions": job.sessions}, folder / "end.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("run", [RUN, "cityscapes-upernet-swint-ours"])
def test_one_two_and_four_processes_train_the_same_model(generated, tmp_path, run):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for size in (1, 2, 4):
        command = [*TORCHRUN, "--standalone", f"--nproc-per-node={size}", str(script), run]
        command += [str(generated("cityscapes")), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, *others = (torch.load(tmp_path / str(size) / "end.pt") for size in (1, 2, 4))
    assert all(
        tensor.dtype == torch.float64 for tensor in one["weights"].values() if tensor.is_floating_point()
    )
    for other in others:
        assert [session["start"] for session in other["sessions"]] == [0]  # really trained, not resumed
        for row, expected in zip(other["history"], one["history"], strict=True):
            assert row == pytest.approx(expected, rel=1e-8)
        for name, tensor in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], tensor, rtol=1e-8, atol=1e-8)


def command(root, steps=20, **overrides):
    """Return the arguments of a small training as a command."""
    small = {"log_every": 1, "threads": 1, "crop_size": [64, 96], "batch_size": 4, **DATA}
    settings = {**small, "steps": steps, "checkpoint_every": 3, **overrides}
    return [
        "-m",
        "mscs",
        "train",
        RUN,
        "--data-root",
        str(root),
        "--device=cpu",
        *(f"--set={key}={value}" for key, value in settings.items()),
    ]


@pytest.fixture
def options(new_project):
    """Return a function that makes a project of its own and gives the options of a command in it."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return lambda folder: {"cwd": new_project(folder), "env": environment, "text": True}


def weights(folder):
    (found,) = folder.rglob("seed-0.safetensors")
    return found.read_bytes()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def children_of(parent):
    """Return the process ids of a process's children."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(generated, tmp_path, options):
    train = [sys.executable, *command(generated("cityscapes")), "--processes=2", "--restarts=1"]
    undisturbed = subprocess.run(train, **options(tmp_path / "whole"), capture_output=True, check=False)
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    started = subprocess.Popen(
        train, **options(tmp_path / "killed"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    output, killed = [], False
    for line in started.stdout:
        output.append(line)
        if "step 8/20" in line and not killed:
            (launcher,) = children_of(started.pid)
            os.kill(children_of(launcher)[1], signal.SIGKILL)
            killed = True
    assert started.wait() == 0
    assert killed
    assert any(re.search("going on from step [69]", line) for line in output)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_two_nodes_train_what_one_does(generated, tmp_path, options):
    train = command(generated("cityscapes"), steps=4)
    one = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node=2", *train],
        **options(tmp_path / "one"),
        capture_output=True,
        check=False,
    )
    assert one.returncode == 0, one.stderr[-2000:]
    where = options(tmp_path / "two")
    two = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    nodes = [
        subprocess.Popen(
            [*TORCHRUN, *two, f"--node-rank={rank}", f"--local-addr=127.0.0.{rank + 1}", *train],
            **where,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    for node in nodes:
        output, _ = node.communicate(timeout=120)
        assert node.returncode == 0, output[-2000:]
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


@pytest.mark.slow
def test_three_processes_are_refused(generated, tmp_path, options):
    where = options(tmp_path / "run")
    where["env"] = {**where["env"], "WORLD_SIZE": "3", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, *command(generated("cityscapes"))], **where, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert "3 processes cannot share a batch of 4 groups" in done.stderr


def test_a_single_process_agrees_with_itself():
    assert World(0, 1, torch.device("cpu")).largest(15) == 15


def test_only_a_broken_connection_counts_as_a_lost_process():
    assert is_lost_peer(RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1234"))
    assert not is_lost_peer(RuntimeError("shapes do not fit"))
