"""The training loop: batch, forward, named loss terms, backward, step, log, save.

A run is a function of its settings and its seed alone. Loss terms are computed per group of images (the
paper's images per GPU) and averaged, batch norm runs over the whole batch, the data order and every random
choice come from (seed, step or sample): so 1, 2 and 4 processes train the same model, and a resumed run ends
where an uninterrupted one would. Masks of dropout and drop-path depend on (seed, step, rank): with those,
another number of processes gives another draw of the same distribution.
"""

import contextlib
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mscs.checkpoint import load_checkpoint, lock, save_checkpoint, save_weights
from mscs.datasets import Dataset, build_dataset
from mscs.distributed import World, all_mean, barrier
from mscs.errors import MscsError
from mscs.loader import Batch, train_loader
from mscs.losses import MultiScaleContrastiveLoss, segmentation_loss
from mscs.models import ModelOutput, build_model
from mscs.optim import build_optimizer, learning_rate
from mscs.params import Settings, to_plain
from mscs.results import write_csv, write_json
from mscs.seeding import derive_seed, torch_generator
from mscs.transforms import ColorJitter, Photometric, PhotoMetricDistortion, TrainTransform

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PHOTOMETRIC: dict[str, Photometric | None] = {
    "jitter": ColorJitter(),
    "photometric": PhotoMetricDistortion(),
    "none": None,
}


class Stopped(MscsError):
    """The run was asked to stop by a signal; its checkpoint is written."""

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}; the same command goes on from there")
        self.exit_code = 128 + signum


@dataclass
class Objective:
    """Eq. (5): class-weighted cross-entropy, auxiliary cross-entropy and the contrastive terms."""

    images_per_group: int
    aux_weight: float
    class_weights: Tensor | None
    contrastive: MultiScaleContrastiveLoss | None
    subsample: int = 1

    def __call__(
        self, output: ModelOutput, labels: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the total loss, its named terms (unweighted) and anchor counts (means over groups)."""
        total = self._cross_entropy(output.logits, labels)
        terms = {"ce": total}
        if output.aux_logits is not None and self.aux_weight:
            terms["aux"] = self._cross_entropy(output.aux_logits, labels)
            total = total + self.aux_weight * terms["aux"]
        counts: dict[str, Tensor] = {}
        if self.contrastive is not None:
            assert output.embeddings is not None
            step = self.subsample
            maps = [x[:, :, ::step, ::step] for x in output.embeddings]
            record = self.contrastive(maps, labels, generators)
            total = total + record.total
            terms |= {f"multi_scale_{i}": value for i, value in enumerate(record.multi_scale)}
            terms |= {f"cross_scale_{i}": value for i, value in enumerate(record.cross_scale)}
            for name in ("anchors", "groups", "views"):
                means = getattr(record, name).double().mean(0)
                counts |= {f"{name}_{i}": value for i, value in enumerate(means)}
        return total, terms, counts

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return segmentation_loss(
            logits, labels, class_weights=self.class_weights, images_per_group=self.images_per_group
        )


def build_objective(settings: Settings, dataset: Dataset, device: torch.device) -> Objective:
    """Return the training objective that `settings` ask for."""
    weights = None
    if settings.class_weighted:
        weights = torch.tensor(dataset.class_weights, dtype=torch.float32, device=device)
    contrastive = None
    if settings.contrastive:
        contrastive = MultiScaleContrastiveLoss(
            scale_weights=settings.scale_weights,
            cross_pairs=settings.cross_pairs,
            multi_scale_weight=settings.multi_scale_weight,
            cross_scale_weight=settings.cross_scale_weight,
            temperature=settings.temperature,
            images_per_group=settings.images_per_group,
            sampling=settings.sampling,
            min_views=settings.min_views,
            max_views=settings.max_views,
            max_anchors=settings.max_anchors,
        )
    return Objective(
        settings.images_per_group, settings.aux_weight, weights, contrastive, settings.embedding_subsample
    )


def build_network(
    settings: Settings, num_classes: int, *, seed: int | None, projector: bool = True
) -> nn.Module:
    """Build the model; its random weights are a function of the seed (None: weights will be loaded)."""
    if seed is not None:
        torch.manual_seed(derive_seed(seed, "weights"))
    return build_model(
        settings.model,
        settings.backbone,
        num_classes,
        projector=settings.projector if projector else None,
        pretrained=settings.pretrained if seed is not None else False,
        **settings.model_options,
    )


def build_transform(settings: Settings) -> TrainTransform:
    """Return the training transform that `settings` ask for."""
    whole = settings.scale_range is None
    return TrainTransform(
        crop_size=None if whole else settings.crop_size,
        scale_range=settings.scale_range or (1.0, 1.0),
        aspect_range=settings.aspect_range,
        scale_base=settings.scale_base,
        hflip=settings.hflip,
        class_max_ratio=settings.class_max_ratio,
        photometric=PHOTOMETRIC[settings.color],
        reflect_pad=settings.reflect_pad,
    )


def open_dataset(settings: Settings, split: str, root: Path) -> Dataset:
    """Open one split of the dataset of a run."""
    options = {"exclude_blacklisted": True} if settings.skip_wrong_labels else {}
    return build_dataset(settings.dataset, split, root, settings.task, **options)


def apply_machine_settings(settings: Settings) -> None:
    """Set PyTorch's process-wide switches: threads, TF32, determinism."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    torch.backends.cudnn.benchmark = not settings.deterministic
    torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)
    # filling fresh memory guards against reads before writes, which no operation here does, at twice the time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@dataclass
class Trainer:
    """One run with one seed, from step 0 or a checkpoint to its last step."""

    settings: Settings
    seed: int
    world: World
    dataset: Dataset
    checkpoints: Path
    workers: int = 0
    stop_after: int | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    on_log: Callable[[dict[str, float]], None] | None = None

    def train(self) -> dict[str, Tensor]:
        """Train to the end and return the model's weights, projectors included."""
        settings, world = self.settings, self.world
        model = build_network(settings, self.dataset.num_classes, seed=self.seed).to(world.device)
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if world.size > 1:
            from mscs.models import convert_sync_batchnorm

            model = convert_sync_batchnorm(model)
        optimizer = build_optimizer(
            model.named_parameters(),
            settings.optimizer,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            fused=world.device.type == "cuda",
        )
        scaler = torch.amp.GradScaler(world.device.type, enabled=settings.precision == "fp16")
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        start = self._resume(parts)
        network = self._wrap(model)
        objective = build_objective(settings, self.dataset, world.device)
        with _signals(world.is_main) as stop, self._progress(start) as bar:
            self._loop(start, network, parts, objective, stop, bar)
        return model.state_dict()

    def _loop(
        self,
        start: int,
        network: nn.Module,
        parts: dict[str, Any],
        objective: Objective,
        stop: "_StopFlag",
        bar: tqdm,
    ) -> None:
        settings, optimizer, scaler = self.settings, parts["optimizer"], parts["scaler"]
        guard = _FiniteGuard(self.world.device)
        network.train()
        for batch in self._batches(start):
            lr = self._learning_rate(batch.step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(derive_seed(self.seed, "dropout", batch.step, self.world.rank))
            images, labels = self._to_device(batch)
            dtype = AUTOCAST[settings.precision]
            with torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not None):
                output = network(images)
                total, terms, counts = objective(output, labels, self._generators(batch.step))
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
            guard.watch(batch, {"total": total, **terms})
            done = batch.step + 1
            if done % settings.log_every == 0 or done == settings.steps:
                guard.check()
                self._log(done, lr, {"loss": total, **terms, **counts}, bar)
            bar.update()
            due = done % settings.checkpoint_every == 0 or stop.signum or done == self.stop_after
            if due and done < settings.steps:
                guard.check()
                self._save(done, parts)
            if stop.signum and done < settings.steps:
                raise Stopped(stop.signum, done)
            if done == self.stop_after:
                return

    def _batches(self, start: int) -> Iterator[Batch]:
        return train_loader(
            self.dataset,
            build_transform(self.settings),
            batch_size=self.settings.batch_size,
            seed=self.seed,
            num_steps=self.settings.steps,
            start_step=start,
            rank=self.world.rank,
            world_size=self.world.size,
            num_workers=self.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        images = batch.images.to(self.world.device, non_blocking=True).contiguous(memory_format=layout)
        return images, batch.labels.to(self.world.device, non_blocking=True)

    def _generators(self, step: int) -> list[torch.Generator]:
        """Return one generator per local group, a function of (seed, step, global group index), on the CPU.

        So the same pixels are drawn on every device.
        """
        per_process = self.settings.batch_size // self.settings.images_per_group // self.world.size
        first = self.world.rank * per_process
        return [torch_generator(self.seed, "anchors", step, first + i) for i in range(per_process)]

    def _learning_rate(self, step: int) -> float:
        settings = self.settings
        return learning_rate(
            step,
            lr=settings.lr,
            schedule=settings.lr_schedule,
            steps=settings.steps,
            warmup_steps=settings.warmup_steps,
            poly_power=settings.poly_power,
            exp_decay=settings.exp_decay,
            steps_per_epoch=max(1, len(self.dataset) // settings.batch_size),
        )

    def _wrap(self, model: nn.Module) -> nn.Module:
        network: nn.Module = model
        if self.settings.compile:
            network = torch.compile(model)  # type: ignore[assignment]
        if self.world.size > 1:
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
        return network

    def _progress(self, start: int) -> tqdm:
        quiet = not (self.world.is_main and sys.stderr.isatty())
        name = f"{self.settings.run} seed {self.seed}"
        return tqdm(total=self.settings.steps, initial=start, desc=name, disable=quiet, unit="step")

    def _log(
        self,
        done: int,
        lr: float,
        values: dict[str, Tensor],
        bar: tqdm,
    ) -> None:
        device = self.world.device
        means = all_mean(torch.stack([v.detach().to(device, torch.float64) for v in values.values()]))
        row = {"step": done, "lr": lr, **dict(zip(values, means.tolist(), strict=True))}
        self.history.append(row)
        if self.on_log is not None and self.world.is_main:
            self.on_log(row)
        bar.set_postfix({key: f"{row[key]:.3g}" for key in ("loss", "ce", "lr")}, refresh=False)
        terms = [key for key in values if not key.startswith(("anchors", "groups", "views"))]
        if self.world.is_main and bar.disable:
            shown = " ".join(f"{key} {row[key]:.4g}" for key in ("lr", *terms))
            print(
                f"{self.settings.run} seed {self.seed} step {done}/{self.settings.steps} {shown}", flush=True
            )

    def _save(self, done: int, parts: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        state["history"] = self.history
        save_checkpoint(self.checkpoints, done, state, self._fingerprint())

    def _resume(self, parts: dict[str, Any]) -> int:
        found = load_checkpoint(self.checkpoints, self._fingerprint(), self.world.device)
        if found is None:
            return 0
        step, state = found
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.history[:] = state["history"]
        if self.world.is_main:
            print(f"{self.settings.run} seed {self.seed}: going on from step {step}", flush=True)
        return step

    def _fingerprint(self) -> dict[str, Any]:
        return {**self.settings.phase("train"), "seed": self.seed}


class _FiniteGuard:
    """Finds the first non-finite term without waiting for the GPU at every step."""

    def __init__(self, device: torch.device):
        self._first_bad = torch.full((), -1, dtype=torch.long, device=device)
        self._recent: deque[tuple[int, list[str], dict[str, Tensor]]] = deque()
        self._eager = device.type == "cpu"

    def watch(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        values = torch.stack([value.detach().to(terms["total"]) for value in terms.values()])
        bad = ~values.isfinite().all()
        self._first_bad = torch.where(bad & (self._first_bad < 0), batch.step, self._first_bad)
        self._recent.append((batch.step, batch.ids, {k: v.detach() for k, v in terms.items()}))
        if self._eager:
            self.check()

    def check(self) -> None:
        """Raise MscsError naming term, step and images where a value was not finite."""
        step = int(self._first_bad)
        recent, self._recent = self._recent, deque()
        for seen, ids, terms in recent:
            if seen == step:
                name = next(k for k in reversed(terms) if not math.isfinite(float(terms[k])))
                raise MscsError(
                    f"loss term {name!r} is {float(terms[name])} at step {step} (images {', '.join(ids)}); "
                    "the last checkpoint is from before. Lower lr, or train in fp32"
                )


@dataclass
class _StopFlag:
    signum: int = 0


@contextlib.contextmanager
def _signals(is_main: bool) -> Iterator[_StopFlag]:
    """Turn SIGTERM and SIGINT into a flag on the main process; its peers leave the stop to it."""
    flag = _StopFlag()

    def remember(signum: int, _frame: object) -> None:
        flag.signum = signum if is_main else 0

    try:
        previous = {s: signal.signal(s, remember) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: the caller deals with signals
        previous = {}
    try:
        yield flag
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@dataclass(frozen=True)
class TrainFiles:
    """Where a run's files go: `work` is big and private, `results` small and shared."""

    work: Path
    results: Path

    def weights(self, seed: int) -> Path:
        """Final weights of one seed."""
        return self.work / "weights" / f"seed-{seed}.safetensors"

    @property
    def metrics(self) -> Path:
        """Deterministic outcome of the training."""
        return self.results / "train.json"

    @property
    def losses(self) -> Path:
        """Loss terms over the steps."""
        return self.results / "losses.csv"


def train_run(
    settings: Settings,
    data_root: Path,
    files: TrainFiles,
    checkpoint_root: Path,
    world: World,
    *,
    workers: int = 0,
    fresh: bool = False,
) -> dict[str, Any]:
    """Train every seed of a run, write weights, metrics and loss curves; return facts for the run record."""
    apply_machine_settings(settings)
    dataset = open_dataset(settings, "train", data_root)
    metrics: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    started = time.time()
    for seed in settings.seeds:
        folder = checkpoint_root / f"{settings.run}-{settings.digest()}" / f"seed-{seed}"
        with lock(folder) if world.is_main else contextlib.nullcontext():
            if fresh and world.is_main:
                for old in folder.glob("step-*"):
                    old.unlink()
            barrier()
            trainer = Trainer(settings, seed, world, dataset, folder, workers)
            weights = trainer.train()
            if world.is_main:
                save_weights(files.weights(seed), weights, {"run": settings.run, "digest": settings.digest()})
            for old in folder.glob("step-*") if world.is_main else ():
                old.unlink()
        rows += [{"seed": seed, **row} for row in trainer.history]
        metrics[f"seed_{seed}"] = summary(trainer.history)
    if world.is_main:
        write_csv(files.losses, rows)
        write_json(files.metrics, metrics)
    memory = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None
    return {"seconds": time.time() - started, "peak_gpu_bytes": memory, "settings": to_plain(settings)}


def summary(history: list[dict[str, float]]) -> dict[str, float]:
    """Average every logged value over the last fifth of the log."""
    tail = history[-max(1, len(history) // 5) :]
    return {key: sum(row[key] for row in tail) / len(tail) for key in tail[0] if key not in ("step", "lr")}
