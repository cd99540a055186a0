"""The bookkeeping of a run: what is trained, what is scored, and what a start finds of an earlier one."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from mscs import runs
from mscs.checkpoint import read_weights, save_checkpoint, save_weights
from mscs.cli import main
from mscs.datasets.base import MANIFEST
from mscs.distributed import World
from mscs.errors import MscsError, UsageError
from mscs.job import Job
from mscs.launch import check_processes
from mscs.monitor import Stopped
from mscs.paths import checkpoint_folder
from mscs.results import file_sha256, read_json, write_json
from mscs.runs import data_digest, evaluate_seed, is_trained, summary, train_seed
from mscs.train import Trainer

RUN = "cityscapes-hrnet-hr48-ours-b8-40k"
SMALL = {
    "steps": 2,
    "batch_size": 4,
    "log_every": 1,
    "checkpoint_every": 2,
    "threads": 1,
    "crop_size": [64, 96],
    "image_size": [64, 96],
    "train_images": 8,
    "val_images": 3,
}
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def new_job(params, generated, project):
    """Return a function that makes a job of small settings in an empty project."""

    def make(run=RUN, observers=(), fresh=False, accept_changed=False, **overrides):
        settings = params.resolve(run, "mini", {**SMALL, **overrides}).settings
        return Job(
            settings=settings,
            seeds=settings.seeds,
            folder=run,
            root=generated("cityscapes"),
            fresh=fresh,
            accept_changed=accept_changed,
            observers=observers,
        )

    return make


def train(job, seed=0):
    with contextlib.redirect_stdout(io.StringIO()):
        return train_seed(job, seed, ALONE)


def evaluate(job, seed=0, **further):
    return evaluate_seed(job, seed, ALONE, job.files(seed).results, **further)


def stop(*_):
    signal.raise_signal(signal.SIGTERM)


def command(name, generated):
    settings = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    return [name, RUN, "--data-root", str(generated("cityscapes")), "--device=cpu", *settings]


def test_a_trained_seed_is_left_alone_unless_its_settings_change(new_job):
    files = new_job().files(0)
    assert train(new_job())
    record = read_json(files.record)
    assert record["sessions"][0]["start"] == 0
    assert record["peak_bytes"] > 1e8
    assert record["weights"] == file_sha256(files.weights)
    assert not train(new_job())
    assert train(new_job(fresh=True))
    assert train(new_job(lr=0.02))
    assert read_json(files.record)["digest"] != record["digest"]
    files.losses.unlink()
    assert train(new_job(lr=0.02))


def test_a_seed_stopped_beside_a_trained_one_goes_on_alone(new_job):
    steps = []

    def observe(seed, history):
        steps.append((seed, history[-1]["step"]))
        if steps == [(0, 1), (0, 2), (1, 1)]:
            stop()

    job = new_job(observers=[observe], seeds=[0, 1])
    assert train(job, 0)
    with pytest.raises(Stopped) as caught:
        train(job, 1)
    assert caught.value.exit_code == 143
    assert not train(job, 0)
    assert train(job, 1)
    assert steps == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [session["start"] for session in read_json(job.files(1).record)["sessions"]] == [0, 1]
    rows = list(csv.DictReader(job.files(1).losses.open()))
    assert [row["step"] for row in rows] == ["1", "2"]


@pytest.mark.parametrize("run", [RUN, "cityscapes-upernet-swint-ours"])
def test_validation_is_for_the_log_alone(new_job, capsys, run):
    found = []
    for every in (None, 1):
        job = new_job(run, fresh=True, validate_every=every, evaluation=["ss"], warmup_steps=1)
        assert train_seed(job, 0, ALONE)
        files = job.files(0)
        found.append((read_weights(files.weights), files.losses.read_text(), files.metrics.read_text()))
    (plain, header), (validated, other) = found[0][0], found[1][0]
    assert header == other
    assert plain.keys() == validated.keys()
    assert all(torch.equal(value, validated[name]) for name, value in plain.items())
    assert found[0][1:] == found[1][1:]
    rows = list(csv.DictReader(files.validation.open()))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert float(rows[1]["miou"]) == evaluate(job)["ss"]["miou"]
    assert f"step 2 validation mIoU {float(rows[1]['miou']):.2f}" in capsys.readouterr().out


def test_a_stopped_training_keeps_its_validations(new_job):
    job = new_job(validate_every=1, checkpoint_every=1, observers=[stop])
    with pytest.raises(Stopped):
        train(job)
    train(new_job(validate_every=1))
    assert [row["step"] for row in csv.DictReader(job.files(0).validation.open())] == ["1", "2"]


def test_a_signal_during_the_last_save_is_not_lost(new_job, monkeypatch):
    def save(folder, step, *rest):
        save_checkpoint(folder, step, *rest)
        stop()

    monkeypatch.setattr("mscs.train.save_checkpoint", save)
    with pytest.raises(Stopped, match="after step 2"):
        train(new_job())


@pytest.mark.parametrize("lost", ["weights", "metrics", "losses", "record"])
def test_a_finished_training_comes_back_from_its_checkpoint(new_job, monkeypatch, lost):
    job = new_job()
    files = job.files(0)
    train(job)
    same = [files.weights, files.losses, files.metrics]
    before = [path.read_bytes() for path in same]
    getattr(files, lost).unlink()

    def never(*_):
        raise AssertionError("a step was trained again")

    monkeypatch.setattr(Trainer, "_accumulate_gradients", never)
    assert train(job)
    assert [path.read_bytes() for path in same] == before
    assert [session["start"] for session in read_json(files.record)["sessions"]] == [0, 2]
    evaluate(job)
    assert not list(checkpoint_folder(job.settings, 0).glob("*.pt"))


def test_checkpoints_outlive_an_evaluation_whose_results_cannot_be_written(new_job):
    job = new_job()
    train(job)
    (job.files(0).results / "confusion.json").mkdir()
    with pytest.raises(MscsError, match="cannot write"):
        evaluate(job)
    assert list(checkpoint_folder(job.settings, 0).glob("*.pt"))


def test_a_seed_is_scored_once_with_the_digest_of_its_training(new_job):
    job = new_job()
    train(job)
    record = evaluate(job)
    assert read_json(job.files(0).evaluation) == record
    assert record["digest"] == job.settings.digest() == read_json(job.files(0).record)["digest"]
    assert record["ss"]["n"] == 1
    assert record["ss"]["miou"] == record["ss"]["seeds"]["0"]["miou"]


@pytest.mark.parametrize("other", ["settings", "seed", "numerics"])
def test_weights_of_another_training_are_not_scored(new_job, monkeypatch, other):
    job = new_job()
    train(job)
    files = job.files(0)
    if other == "settings":
        job = new_job(lr=0.02)
    elif other == "seed":
        later = job.files(1)
        later.weights.write_bytes(files.weights.read_bytes())
        later.record.parent.mkdir()
        later.record.write_bytes(files.record.read_bytes())
    else:
        newer = {"train": {**job.settings.numerics["train"], "optimizer": 99}}
        changed = job.settings.model_copy(update={"numerics": {**job.settings.numerics, **newer}})
        job = Job(settings=changed, seeds=[0], folder=RUN, root=job.root)
    seed = int(other == "seed")
    assert not is_trained(job.settings, seed, job.files(seed), data_digest(job.data_root))
    with pytest.raises(
        MscsError, match="weights of other settings, another seed or another version"
    ) as caught:
        evaluate(job, seed)
    assert caught.value.exit_code == 1
    assert not job.files(seed).evaluation.exists()


def test_damaged_weights_are_not_scored(new_job, generated, capsys):
    assert main(command("train", generated)) == 0
    (weights,) = list(new_job().files(0).work.parent.rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert main(command("evaluate", generated)) == 1
    error = capsys.readouterr().err
    assert error.startswith("mscs: error: ")
    assert "damaged or exchanged" in error
    assert error.count("\n") == 1
    assert main(command("train", generated)) == 0
    assert "is trained under" not in capsys.readouterr().out
    assert main(command("evaluate", generated)) == 0


@pytest.mark.parametrize(("kind", "message"), [("nan", "not finite"), ("integers", r"is torch\.int32, not")])
def test_weights_that_no_training_leaves_are_not_scored(new_job, kind, message):
    job = new_job()
    train(job)
    files = job.files(0)
    tensors, header = read_weights(files.weights)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    bad = torch.full_like(tensors[name], math.nan) if kind == "nan" else tensors[name].int()
    save_weights(files.weights, {**tensors, name: bad}, header)
    write_json(files.record, {**read_json(files.record), "weights": file_sha256(files.weights)})
    with pytest.raises(MscsError, match=message):
        evaluate(job)
    with pytest.raises(MscsError, match=message):
        evaluate(job, checkpoint=files.weights)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"weights": 3}'])
def test_a_broken_record_is_one_line_and_trained_anew(new_job, content):
    job = new_job()
    train(job)
    job.files(0).record.write_text(content)
    with pytest.raises(MscsError, match=r"run\.json"):
        evaluate(job)
    assert train(job)
    assert evaluate(job)


def test_two_trainings_into_the_same_files_are_refused_whatever_their_settings(new_job):
    refused = []

    def second(*_):
        with pytest.raises(UsageError, match="another process is training into") as caught:
            train(new_job(lr=0.02))
        refused.append(caught)

    assert train(new_job(observers=[second]))
    assert len(refused) == 2
    assert train(new_job(lr=0.02))


def test_a_training_that_replaces_another_is_done_when_its_record_is_written(new_job, monkeypatch):
    train(new_job())
    job = new_job(lr=0.02)
    files, written = job.files(0), []

    def write(path, value):
        assert not files.metrics.exists()
        written.append(path.name)
        if path == files.metrics:
            record = read_json(files.record)
            assert record["digest"] == job.settings.digest()
            assert record["weights"] == file_sha256(files.weights)
            raise MscsError("the disk is full")
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_json", write)
        with pytest.raises(MscsError, match="disk is full"):
            train(job)
    assert written == ["run.json", "train.json"]
    assert not is_trained(job.settings, 0, files, data_digest(job.data_root))
    assert train(job)
    assert is_trained(job.settings, 0, files, data_digest(job.data_root))


def test_an_interrupted_training_under_other_settings_is_named(new_job, capsys):
    job = new_job(observers=[stop])
    folder = checkpoint_folder(job.settings, 0).parents[1]
    (folder / f"{RUN}-b8-0123456789ab" / "seed-0").mkdir(parents=True)  # of another run
    (folder / f"{RUN}-b8-0123456789ab" / "seed-0" / "step-00000001.json").write_text("{}")
    with pytest.raises(Stopped):
        train(job)
    assert train_seed(new_job(lr=0.02), 0, ALONE)
    assert "interrupted training, with other settings (lr: 0.1 -> 0.02)" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": []}', "\xff"])
def test_damaged_notes_of_another_interrupted_training_are_no_obstacle(new_job, content):
    other = checkpoint_folder(new_job(lr=0.02).settings, 0)
    other.mkdir(parents=True)
    (other / "step-00000001.json").write_bytes(content.encode("latin-1"))
    assert train(new_job())


def test_a_checkpoint_of_another_version_of_the_code_is_used_only_if_asked(generated, project, capsys):
    arguments = command("train", generated)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mscs.trackers.build_tracker", lambda *_: stop)
        assert main([*arguments, "--log=dvclive"]) == 143
    units = yaml.safe_load((project / "numerics.yaml").read_text())
    units["units"]["optimizer"]["version"] += 1
    (project / "numerics.yaml").write_text(yaml.safe_dump(units))
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "--accept-changed" in error
    assert "'optimizer': 1" in error
    assert "'optimizer': 2" in error
    assert error.count("\n") == 1
    assert main([*arguments, "--accept-changed"]) == 0
    assert "going on from step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "fits"), [(1, True), (2, True), (4, True), (8, True), (3, False), (16, False)]
)
def test_processes_share_the_groups_of_a_batch(params, size, fits):
    settings = params.resolve(RUN, "mini", {"batch_size": 16, "images_per_group": 2}).settings
    if fits:
        check_processes(settings, size)
    else:
        with pytest.raises(UsageError, match=f"{size} processes cannot share a batch of 8 groups") as caught:
            check_processes(settings, size)
        assert "divisors of 8" in str(caught.value)


def test_summary_averages_the_tail_without_overflown_gradients():
    history = [{"step": i, "lr": 0.1, "loss": float(i), "gradient_norm": math.inf} for i in range(10)]
    assert summary(history) == {"loss": 8.5, "gradient_norm": None}
    history[-1]["gradient_norm"] = 3.0
    assert summary(history)["gradient_norm"] == 3.0


def test_a_training_on_other_images_is_another_training(new_job):
    """Neither its weights nor its checkpoints count, whether or not the settings are the same."""
    job = new_job()
    job = dataclasses.replace(job, root=Path(shutil.copytree(job.data_root, "images")))
    write_json(job.data_root / MANIFEST, {"digest": "first"})
    assert train(job)
    assert not train(job)
    write_json(job.data_root / MANIFEST, {"digest": "second"})
    assert not is_trained(job.settings, 0, job.files(0), "second")
    with pytest.raises(UsageError, match=r"data_digest: 'first' -> 'second'.*--fresh"):
        train(job)
    assert train(dataclasses.replace(job, fresh=True))
    assert read_json(job.files(0).record)["data"]["digest"] == "second"
