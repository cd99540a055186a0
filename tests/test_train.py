"""The training loop and what watches it, on one process."""

import contextlib
import io
import json
import math
import resource
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from mscs import build
from mscs.distributed import World
from mscs.errors import MscsError, UsageError
from mscs.launch import check_processes
from mscs.loader import Batch
from mscs.losses.objective import EmbeddingLoss, Objective, Terms
from mscs.models import ModelOutput
from mscs.monitor import FiniteGuard, Stopped
from mscs.optim import gradient_norm
from mscs.seeding import torch_generator
from mscs.train import Trainer

RUN = "cityscapes-hrnet-hr48-ours-b8-40k"
SMALL = {
    "steps": 6,
    "batch_size": 4,
    "log_every": 1,
    "checkpoint_every": 2,
    "threads": 1,
    "crop_size": [64, 96],
    "image_size": [64, 96],
}


def trainer(params, root, folder, run=RUN, seed=0, **overrides):
    settings = params.resolve(run, "mini", {**SMALL, **overrides}).settings
    build.apply_machine_settings(settings)
    world = World(0, 1, torch.device("cpu"))
    return Trainer(settings, seed, world, build.open_dataset(settings, "train", root), folder)


def train(trainer):
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer.train()


def stop_after(trainer, step):
    """Train until a signal that comes in a step."""

    def observe(seed, history):
        if history[-1]["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    trainer.observers = [observe]
    with pytest.raises(Stopped):
        train(trainer)


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
        stop_after(first, stop)
        second = trainer(params, root, tmp_path / str(stop))
        assert same(train(second), expected)
        assert second.history == whole.history


def test_training_lowers_the_loss(params, generated, tmp_path):
    run = trainer(params, generated("cityscapes"), tmp_path, steps=16)
    train(run)
    assert run.history[-1]["ce"] < 0.8 * run.history[0]["ce"]


@pytest.mark.parametrize("model", ["hrnet-hr48", "ocrnet-hr48", "deeplabv3-r101", "upernet-swint"])
def test_another_family_of_backbones_trains_without_further_options(params, generated, tmp_path, model):
    options = {"backbone": "convnext_atto", "steps": 1, "warmup_steps": 0}
    if model == "ocrnet-hr48":
        wrong = trainer(params, generated("cityscapes"), tmp_path, f"cityscapes-{model}-ours", **options)
        with pytest.raises(UsageError, match=r"has 2 feature maps for the loss, .* use --set feature_maps=2"):
            train(wrong)
        options["feature_maps"] = 2
    run = trainer(params, generated("cityscapes"), tmp_path, f"cityscapes-{model}-ours", **options)
    train(run)
    assert math.isfinite(run.history[0]["loss"])


def test_a_non_finite_term_stops_the_run_and_is_named(params, generated, tmp_path):
    with pytest.raises(MscsError, match=r"loss term '\w+' is (nan|inf) at step \d+ \(images "):
        train(trainer(params, generated("cityscapes"), tmp_path, lr=1e12))


def test_a_non_finite_term_leaves_what_is_needed_to_look_into_it(params, generated, tmp_path):
    with pytest.raises(MscsError, match="from the last checkpoint"):
        train(trainer(params, generated("cityscapes"), tmp_path, lr=1e12, checkpoint_every=1))
    facts = json.loads((tmp_path / "failure.json").read_text())
    assert not math.isfinite(float(facts["terms"][facts["term"]]))
    assert Path(facts["last_checkpoint"]).name == f"step-{facts['step']:08d}.pt"
    assert len(facts["images"]) == 4
    assert facts["seed"] == 0


class BadGradient(Trainer):
    """Its gradients are broken from the third step on, while every loss term is sound."""

    def _accumulate_gradients(self, batch, network, *rest):
        found = super()._accumulate_gradients(batch, network, *rest)
        if batch.step >= 2:
            next(network.parameters()).grad[:] = math.nan
        return found


def test_a_non_finite_gradient_stops_before_it_reaches_the_weights(params, generated, tmp_path):
    job = trainer(params, generated("cityscapes"), tmp_path, checkpoint_every=1)
    job.__class__ = BadGradient
    with pytest.raises(MscsError, match=r"loss term 'gradient_norm' is nan at step 2 \(images "):
        train(job)
    newest = max(tmp_path.glob("step-*.pt"))
    assert newest.name == "step-00000002.pt"
    saved = torch.load(newest, weights_only=True)["model"].values()
    assert all(tensor.isfinite().all() for tensor in saved)


class OtherProcess(World):
    """One of two processes, of which the other saw a term break at step 1."""

    def largest(self, value):
        return max(value, -1)


def test_processes_agree_on_the_first_bad_step_and_the_one_that_had_it_names_it(tmp_path):
    guard = FiniteGuard(OtherProcess(0, 2, torch.device("meta")), tmp_path, seed=0)
    guard._first_bad = torch.tensor(guard._NEVER)
    for step, value in enumerate((1.0, 2.0, math.nan)):
        terms = {"loss": torch.tensor(value), "ce": torch.tensor(value)}
        guard.watch(Batch(None, None, [f"image {step}"], step), terms)
    with pytest.raises(MscsError, match="not finite at step 1 on another process"):
        guard.check()
    assert not list(tmp_path.iterdir())


def test_exhausted_gpu_memory_says_what_to_change(params, generated, tmp_path, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Objective, "__call__", exhausted)
    with pytest.raises(MscsError, match="hold 8 images per process") as caught:
        train(trainer(params, generated("cityscapes"), tmp_path, batch_size=8))
    for advice in ("model_options={checkpointing: true}", f"`mscs doctor {RUN} --profile mini --measure`"):
        assert advice in str(caught.value)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_batch_is_shared_by_groups_and_each_has_its_own_generator(params, generated, tmp_path, size):
    job = trainer(params, generated("cityscapes"), tmp_path, seed=3, batch_size=16, images_per_group=2)
    states = []
    for rank in range(size):
        job.world = World(rank, size, torch.device("cpu"))
        states += [generator.get_state() for generator in job._generators(5)]
    expected = [torch_generator(3, "anchors", 5, group).get_state() for group in range(8)]
    assert len(states) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))
    assert len({bytes(state.numpy()) for state in states}) == 8


class MeanEmbedding(EmbeddingLoss):
    """Pulls embeddings towards a running mean, which is a state of its own."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, embeddings, labels, generators):
        now = embeddings[0].mean((0, 2, 3))
        value = (now - self.mean).square().sum()
        self.mean += 0.5 * (now.detach() - self.mean)
        return Terms(0.1 * value, {"to_mean": value}, {})


def test_the_state_of_a_loss_is_in_the_checkpoint_and_comes_back(params, generated, tmp_path, monkeypatch):
    channels = params.resolve(RUN, "mini").settings.model.options["projector_channels"]
    losses = []

    def instead(block, images_per_group):
        losses.append(MeanEmbedding(channels))
        return losses[-1]

    monkeypatch.setitem(build.EMBEDDING_LOSSES, "contrastive", instead)
    expected = train(trainer(params, generated("cityscapes"), tmp_path / "whole"))
    first = trainer(params, generated("cityscapes"), tmp_path / "parts")
    stop_after(first, 3)
    saved = torch.load(tmp_path / "parts" / "step-00000003.pt", weights_only=True)["objective"]
    assert torch.equal(saved["on_embeddings.0.mean"], losses[1].mean)
    assert saved["on_embeddings.0.mean"].any()
    second = trainer(params, generated("cityscapes"), tmp_path / "parts")
    assert same(train(second), expected)
    assert "to_mean" in second.history[-1]
    assert torch.equal(losses[2].mean, losses[0].mean)


def test_the_gradient_norm_is_that_of_all_gradients():
    model = torch.nn.Linear(2, 1)
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    assert gradient_norm(model).item() == pytest.approx(math.sqrt(9 + 16 + 1))


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(params, generated, tmp_path):
    run = trainer(params, generated("cityscapes"), tmp_path, checkpoint_every=1)
    stop_after(run, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(MscsError, match=r"cannot write .*step-00000002\.pt"):
            train(trainer(params, generated("cityscapes"), tmp_path, checkpoint_every=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["step-00000001.pt"]
    whole = train(trainer(params, generated("cityscapes"), tmp_path / "whole", checkpoint_every=1))
    assert same(train(trainer(params, generated("cityscapes"), tmp_path, checkpoint_every=1)), whole)


def test_the_objective_is_eq_5(params, generated):
    settings = params.resolve(RUN, "mini", SMALL).settings
    dataset = build.open_dataset(settings, "train", generated("cityscapes"))
    objective = build.objective(settings, dataset.class_weights)
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
        weighted(output.logits[i : i + 1], labels[i : i + 1], weight=torch.tensor(dataset.class_weights))
        for i in range(4)
    ]
    assert terms["ce"].item() == pytest.approx(sum(per_image).item() / 4, rel=1e-5)
    assert counts["groups_0"] == 3


def test_auxiliary_loss_is_weighted(params):
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    logits, aux = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    total, terms, _ = Objective(1, 0.4)(ModelOutput(logits, aux, None), labels, [])
    assert total.item() == pytest.approx((terms["ce"] + 0.4 * terms["aux"]).item())


def test_an_auxiliary_head_of_weight_0_still_has_gradients(params):
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    logits, aux = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    total, terms, _ = Objective(1, 0.0)(ModelOutput(logits, aux, None), labels, [])
    total.backward()
    assert terms.keys() == {"ce"}
    assert not aux.grad.any()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(params, generated, tmp_path, parts):
    def ended(parts):
        options = {"batch_size": 8, "steps": 3, "batch_norm": "frozen", "accumulation_steps": parts}
        options |= {"precision": "fp64", "lr": 0.001}  # the order of sums is all that may differ
        job = trainer(params, generated("cityscapes"), tmp_path / str(parts), **options)
        return train(job), job.history

    (weights, history), (expected, rows) = ended(parts), ended(1)
    assert [row.keys() for row in history] == [row.keys() for row in rows]
    for row, other in zip(history, rows, strict=True):
        assert row == pytest.approx(other, rel=1e-8)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-8, atol=1e-10)
    means = [tensor for name, tensor in weights.items() if name.endswith("running_mean")]
    assert means
    assert not any(tensor.any() for tensor in means)


def test_batch_norm_over_parts_of_a_batch_must_be_asked_for_by_name(params, generated, tmp_path):
    with pytest.raises(UsageError, match="batch_norm=part"):
        trainer(params, generated("cityscapes"), tmp_path, accumulation_steps=2)
    with pytest.raises(UsageError, match="does not divide"):
        trainer(params, generated("cityscapes"), tmp_path, accumulation_steps=3, batch_norm="part")
    asked = trainer(
        params, generated("cityscapes"), tmp_path, steps=2, accumulation_steps=2, batch_norm="part"
    )
    weights = train(asked)
    counted = {int(v) for k, v in weights.items() if k.endswith("num_batches_tracked")}
    assert counted == {4}  # two parts in each of two steps
    with pytest.raises(UsageError, match="4 processes cannot share a batch of 4 groups of images in 2 parts"):
        check_processes(asked.settings, 4)


def test_a_disk_that_hangs_ends_the_wait(params, generated, tmp_path, monkeypatch):
    job = trainer(params, generated("cityscapes"), tmp_path)
    monkeypatch.setattr("mscs.loader.STALLED_SECONDS", 1)
    monkeypatch.setattr(type(job.dataset), "__getitem__", lambda *_: time.sleep(30))
    job.workers = 1
    with pytest.raises(MscsError, match="no batch came from the processes that read images"):
        train(job)


@pytest.mark.parametrize(("run", "allowed"), [(RUN, 1), ("cityscapes-hrnet-hr48-ce-b8-40k", 0)])
def test_the_loop_waits_for_the_device_at_logging_steps_only(
    params, generated, tmp_path, monkeypatch, run, allowed
):
    """But for one read of how many anchors there are, which gives the loss its shapes."""
    reads, per_step = [], []
    make_guard, make_batches = FiniteGuard.__init__, Trainer._batches

    def guard_of_a_gpu(guard, *args):
        make_guard(guard, *args)
        guard._eager = False

    def batches(job, start):
        for batch in make_batches(job, start):
            yield batch
            per_step.append(len(reads))
            reads.clear()

    def watched(read):
        def reading(tensor, *args, **kwargs):
            reads.append(read)
            return read(tensor, *args, **kwargs)

        return reading

    job = trainer(params, generated("cityscapes"), tmp_path, run, log_every=6, checkpoint_every=6)
    monkeypatch.setattr(FiniteGuard, "__init__", guard_of_a_gpu)
    monkeypatch.setattr(Trainer, "_batches", batches)
    for name in (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__int__",
        "__float__",
        "__bool__",
        "__index__",
        "nonzero",
    ):
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    train(job)
    assert per_step[1:5] == [allowed] * 4  # the first includes what came before the loop
    assert per_step[5] > allowed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("run", "allowed"), [(RUN, 1), ("cityscapes-hrnet-hr48-ce-b8-40k", 0)])
def test_a_gpu_is_waited_for_at_logging_steps_only(params, generated, tmp_path, run, allowed):
    """The same as PyTorch itself counts it, which sees waits that are no reads."""
    settings = params.resolve(run, "mini", {**SMALL, "log_every": 6, "checkpoint_every": 6}).settings
    world = World(0, 1, torch.device("cuda", 0))
    job = Watched(
        settings, 0, world, build.open_dataset(settings, "train", generated("cityscapes")), tmp_path
    )
    train(job)
    assert [len(waits) for waits in job.waits[1:]] == [allowed] * 5


class Watched(Trainer):
    """Counts what makes the host wait in the forward and backward pass of every step."""

    def _accumulate_gradients(self, *args):
        self.__dict__.setdefault("waits", [])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return super()._accumulate_gradients(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                self.waits.append([str(w.message) for w in caught if "synchroniz" in str(w.message)])


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
    build.apply_machine_settings(settings)
    dataset = build.open_dataset(settings, "train", root)
    job = Trainer(settings, 0, World(0, 1, torch.device("cpu")), dataset, tmp_path)
    train(job)
    row = job.history[-1]
    terms = [key for key in row if "scale_" in key]
    ours = settings.loss.contrastive
    assert len(terms) == (len(ours.scale_weights) + len(ours.cross_pairs) if ours else 0)
    assert ("aux" in row) == (settings.model.aux_weight > 0)
    assert math.isfinite(row["loss"])
