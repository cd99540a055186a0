import contextlib
import io
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from mscs.distributed import World
from mscs.engine import Objective, Trainer, apply_machine_settings, build_objective, open_dataset, summary
from mscs.errors import MscsError
from mscs.models import ModelOutput

RUN = "cityscapes-hrnet-hr48-ours-b8-40k"
SMALL = {"steps": 6, "log_every": 1, "checkpoint_every": 2, "threads": 1, "crop_size": [64, 96], "image_size": [64, 96]}


def trainer(params, root, folder, run=RUN, seed=0, **overrides):
    settings = params.resolve(run, "mini", {**SMALL, **overrides}).settings
    apply_machine_settings(settings)
    world = World(0, 1, torch.device("cpu"))
    return Trainer(settings, seed, world, open_dataset(settings, "train", root), folder)


def train(trainer):
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer.train()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_two_trainings_are_bitwise_equal_and_seeds_differ(params, generated, tmp_path):
    root = generated("cityscapes")
    runs = [train(trainer(params, root, tmp_path / str(i), seed=s, steps=3)) for i, s in enumerate((0, 0, 1))]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_a_run_stopped_at_any_step_ends_bitwise_where_an_uninterrupted_one_does(params, generated, tmp_path):
    root = generated("cityscapes")
    whole = trainer(params, root, tmp_path / "whole")
    expected = train(whole)
    for stop in (1, 4):
        first = trainer(params, root, tmp_path / str(stop))
        first.stop_after = stop
        train(first)
        second = trainer(params, root, tmp_path / str(stop))
        assert same(train(second), expected)
        assert second.history == whole.history


def test_training_lowers_the_loss(params, generated, tmp_path):
    run = trainer(params, generated("cityscapes"), tmp_path, steps=16)
    train(run)
    assert run.history[-1]["ce"] < 0.8 * run.history[0]["ce"]


def test_a_non_finite_term_stops_the_run_and_is_named(params, generated, tmp_path):
    with pytest.raises(MscsError, match=r"loss term '\w+' is (nan|inf) at step \d+ \(images "):
        train(trainer(params, generated("cityscapes"), tmp_path, lr=1e12))


def test_the_objective_is_eq_5(params, generated):
    settings = params.resolve(RUN, "mini", SMALL).settings
    dataset = open_dataset(settings, "train", generated("cityscapes"))
    objective = build_objective(settings, dataset, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4, 64, 96), generator=generator)
    maps = [torch.randn(4, 8, 64 // s, 96 // s, generator=generator) for s in (4, 8, 16, 32)]
    output = ModelOutput(torch.randn(4, 19, 64, 96, generator=generator), None, maps)
    total, terms, counts = objective(output, labels, [torch.Generator().manual_seed(i) for i in range(4)])
    weights = (1.0, 0.7, 0.4, 0.1)
    expected = terms["ce"]
    expected = expected + 0.1 * sum(w * terms[f"multi_scale_{i}"] for i, w in enumerate(weights))
    expected = expected + 0.1 * (terms["cross_scale_0"] + terms["cross_scale_1"])
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    weighted = torch.nn.functional.cross_entropy
    per_image = [
        weighted(output.logits[i : i + 1], labels[i : i + 1], weight=torch.tensor(dataset.class_weights)) for i in range(4)
    ]
    assert terms["ce"].item() == pytest.approx(sum(per_image).item() / 4, rel=1e-5)
    assert counts["groups_0"] == 3


def test_auxiliary_loss_is_weighted(params):
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    logits, aux = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    total, terms, _ = Objective(1, 0.4, None, None)(ModelOutput(logits, aux, None), labels, [])
    assert total.item() == pytest.approx((terms["ce"] + 0.4 * terms["aux"]).item())


def test_summary_averages_the_tail():
    history = [{"step": i, "lr": 0.1, "loss": float(i)} for i in range(10)]
    assert summary(history) == {"loss": 8.5}


@pytest.mark.parametrize("overrides", [{"precision": "bf16"}, {"channels_last": False}])
def test_options_of_the_machine_train_too(params, generated, tmp_path, overrides):
    run = trainer(params, generated("cityscapes"), tmp_path, steps=2, **overrides)
    train(run)
    assert math.isfinite(run.history[-1]["loss"])


def every_run():
    from mscs.params import load_params

    return load_params().runs


@pytest.mark.parametrize("run", every_run())
def test_every_row_of_every_table_takes_a_step(params, generated, tmp_path, run):
    """Two steps of each run's own mini network, loss, schedule and optimiser, on images of 64x96."""
    root = generated(run.split("-")[0])
    overrides = {**SMALL, "steps": 2, "batch_size": 4, "short_side": None}
    settings = params.resolve(run, "mini", overrides).settings
    apply_machine_settings(settings)
    job = Trainer(settings, 0, World(0, 1, torch.device("cpu")), open_dataset(settings, "train", root), tmp_path)
    train(job)
    row = job.history[-1]
    terms = [key for key in row if "scale_" in key]
    assert len(terms) == (len(settings.scale_weights) + len(settings.cross_pairs) if settings.contrastive else 0)
    assert ("aux" in row) == (settings.aux_weight > 0)
    assert math.isfinite(row["loss"])


SCRIPT = """
import contextlib, io, sys, torch
from pathlib import Path
from mscs.distributed import join_world
from mscs.engine import Trainer, open_dataset, apply_machine_settings
from mscs.params import load_params
run, root, folder = sys.argv[1:4]
torch.set_default_dtype(torch.float64)
options = {"head_channels": 16, "projector_channels": 16} if "hrnet" in run else {
    "channels": 16, "aux_channels": 8, "dropout": 0.0, "drop_path_rate": 0.0, "projector_channels": 16}
settings = load_params().resolve(run, "mini", {
    "steps": 12, "log_every": 1, "batch_size": 8, "threads": 1, "crop_size": [64, 64], "image_size": [64, 96],
    "lr": 0.001, "model_options": {**load_params().resolve(run, "mini").settings.model_options, **options}}).settings
apply_machine_settings(settings)
with join_world("cpu") as world:
    job = Trainer(settings, 0, world, open_dataset(settings, "train", Path(root)), Path(folder) / "checkpoints")
    with contextlib.redirect_stdout(io.StringIO()):
        weights = job.train()
    if world.is_main:
        torch.save({"weights": weights, "history": job.history}, Path(folder) / f"{world.size}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("run", [RUN, "cityscapes-upernet-swint-ours"])
def test_one_two_and_four_processes_train_the_same_model(generated, tmp_path, run):
    root = generated("cityscapes")
    for size in (1, 2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        done = subprocess.run(
            [*command, str(script), run, str(root), str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, *others = (torch.load(tmp_path / f"{size}.pt") for size in (1, 2, 4))
    for other in others:
        for row, expected in zip(other["history"], one["history"], strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        for name, tensor in one["weights"].items():
            assert torch.allclose(other["weights"][name].double(), tensor.double(), rtol=1e-5, atol=1e-7), name


def command_line(root, *extra):
    settings = [f"--set={k}={v}" for k, v in {**SMALL, "steps": 30, "checkpoint_every": 3}.items()]
    return [sys.executable, "-m", "mscs", "train", RUN, "--data-root", str(root), *settings, *extra]


@pytest.mark.slow
def test_killed_ten_times_the_weights_are_those_of_an_uninterrupted_run(generated, tmp_path, monkeypatch):
    root = generated("cityscapes")
    (tmp_path / "params.yaml").write_bytes(open("params.yaml", "rb").read())
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}

    def weights(folder):
        (found,) = folder.rglob("seed-0.safetensors")
        return found.read_bytes()

    def start(folder):
        folder.mkdir(exist_ok=True)
        (folder / "params.yaml").write_bytes(open("params.yaml", "rb").read())
        return subprocess.Popen(
            command_line(root), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    assert start(tmp_path / "whole").wait() == 0
    killed, kills = tmp_path / "killed", 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        process = start(killed)
        wanted = int(torch.randint(1, 7, (), generator=generator))
        for line in process.stdout:
            wanted -= bool(re.search(r"step \d+/30", line))
            if wanted == 0:
                process.kill()
                kills += 1
                break
        if process.wait() == 0:
            break
    assert kills >= 10 or weights(killed) == weights(tmp_path / "whole")
    assert weights(killed) == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_next_start_goes_on(generated, tmp_path, signum, code):
    root = generated("cityscapes")
    (tmp_path / "params.yaml").write_bytes(open("params.yaml", "rb").read())
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        command_line(root), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "step 4/30" in line:
            process.send_signal(signum)
            break
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "goes on from there" in error
    done = subprocess.run(command_line(root), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert re.search(r"going on from step [45]", done.stdout)


@pytest.mark.slow
def test_three_processes_are_refused(generated, tmp_path):
    environment = {**os.environ, "WORLD_SIZE": "3", "RANK": "0"}
    done = subprocess.run(
        command_line(generated("cityscapes")), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "use 1, 2 or 4" in done.stderr
