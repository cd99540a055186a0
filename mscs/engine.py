"""The training loop: batch, forward, named loss terms, backward, step, log, save.

A run is a function of its settings and its seed alone. Loss terms are computed per group of images (the
paper's images per GPU) and averaged, batch norm runs over the whole batch, the data order and every random
choice come from (seed, step or sample): so 1, 2 and 4 processes train the same model, and a resumed run ends
where an uninterrupted one would. Masks of dropout and drop-path depend on (seed, step, rank): with those,
another number of processes gives another draw of the same distribution.
"""

import contextlib
import math
import os
import resource
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mscs.checkpoint import (
    differences,
    load_checkpoint,
    lock,
    read_header,
    save_checkpoint,
    save_weights,
)
from mscs.datasets import Dataset, build_dataset
from mscs.distributed import WORLD_SIZES, World, all_mean, barrier, is_lost_peer
from mscs.errors import MscsError, UsageError
from mscs.loader import STALLED_SECONDS, Batch, train_loader
from mscs.losses import MultiScaleContrastiveLoss, segmentation_loss
from mscs.models import ModelOutput, build_model, convert_sync_batchnorm
from mscs.optim import build_optimizer, learning_rate
from mscs.params import Settings, to_plain
from mscs.results import read_json, write_csv, write_json
from mscs.seeding import derive_seed, torch_generator
from mscs.transforms import ColorJitter, Photometric, PhotoMetricDistortion, TrainTransform

HIDDEN = ("step", "groups", "views", "anchors")
"""Beginnings of the names in a log row that go to files only."""

AUTOCAST = {"fp64": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE = {"fp64": torch.float64}
"""Of weights and images, where it is not float32."""
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


@dataclass(frozen=True)
class Snapshot:
    """What observers see at a logging step: all log rows so far, and the main process's part of the batch.

    images: float (b, 3, h, w), normalised. labels: int64 (b, h, w). logits: float (b, K, h', w').
    """

    seed: int
    history: Sequence[Mapping[str, float]]
    images: Tensor
    labels: Tensor
    logits: Tensor


Observer = Callable[[Snapshot], None]


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
        if output.aux_logits is not None:
            # with weight 0 too: processes that share gradients must all have one for every parameter
            aux = self._cross_entropy(output.aux_logits, labels)
            terms |= {"aux": aux} if self.aux_weight else {}
            total = total + self.aux_weight * aux
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
    model = build_model(
        settings.model,
        settings.backbone,
        num_classes,
        projector=settings.projector if projector else None,
        pretrained=settings.pretrained if seed is not None else False,
        **settings.model_options,
    )
    return model.to(DTYPE.get(settings.precision, torch.float32))


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
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
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
    observers: Sequence[Observer] = ()
    history: list[dict[str, float]] = field(default_factory=list)
    sessions: list[dict[str, float]] = field(default_factory=list)
    """Of every start of this run so far: when (seconds since 1970), with how many processes, its first step,
    and its seconds until the last checkpoint."""

    def train(self) -> dict[str, Tensor]:
        """Train to the end and return the model's weights, projectors included."""
        settings, world = self.settings, self.world
        with _explained(settings, world):
            model = build_network(settings, self.dataset.num_classes, seed=self.seed).to(world.device)
            if settings.channels_last:
                model = model.to(memory_format=torch.channels_last)
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
            with _signals() as stop, _Progress(settings, self.seed, world, start) as progress:
                self._loop(start, network, parts, objective, stop, progress)
        return model.state_dict()

    def _loop(
        self,
        start: int,
        network: nn.Module,
        parts: dict[str, Any],
        objective: Objective,
        stop: "_StopFlag",
        progress: "_Progress",
    ) -> None:
        settings, world = self.settings, self.world
        optimizer, scaler = parts["optimizer"], parts["scaler"]
        guard = _FiniteGuard(world, self.checkpoints, self.seed)
        network.train()
        if settings.batch_norm == "frozen":
            freeze_batch_norm(network)
        for batch in self._batches(start):
            done = batch.step + 1
            shown = done % settings.log_every == 0 or done == settings.steps
            lr = self._learning_rate(batch.step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(derive_seed(self.seed, "dropout", batch.step, world.rank))
            optimizer.zero_grad(set_to_none=True)
            terms, counts, last_part = self._accumulate_gradients(batch, network, objective, scaler)
            scaler.unscale_(optimizer)
            norm = {"gradient_norm": gradient_norm(parts["model"])}
            # in fp16 an overflow of the gradient is no failure: the scaler skips the step
            guard.watch(batch, terms if scaler.is_enabled() else norm | terms)
            scaler.step(optimizer)
            scaler.update()
            if shown:
                guard.check()
                progress.show(self._log(done, lr, terms | counts | norm))
                self._observe(Snapshot(self.seed, self.history, *last_part))
            del last_part  # or its logits would lie beside those of the next step
            progress.advance()
            signum = world.largest(stop.signum)
            stopping = signum or done in (self.stop_after, settings.steps)
            if stopping or done % settings.checkpoint_every == 0:
                guard.check()
                self._save(done, parts, progress.seconds)
            if signum:
                raise Stopped(signum, done)
            if done == self.stop_after:
                return
        signum = world.largest(stop.signum)  # one that came during the last save
        if signum:
            raise Stopped(signum, settings.steps)

    def _accumulate_gradients(
        self, batch: Batch, network: nn.Module, objective: Objective, scaler: torch.amp.GradScaler
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Add the gradients of a batch, part by part, to those that the parameters hold.

        Returns the loss and its terms, the anchor counts (means over the parts), and images, labels and
        logits of the last part.
        """
        parts, device = self.settings.accumulation_steps, self.world.device
        generators = self._generators(batch.step)
        per_part, rest = divmod(len(generators), parts)
        if rest:
            raise UsageError(
                f"accumulation_steps {parts} does not divide a process's {len(generators)} groups of images"
            )
        dtype = AUTOCAST[self.settings.precision]
        means: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        pieces = zip(*(x.chunk(parts) for x in self._to_device(batch)), strict=True)
        for part, (images, labels) in enumerate(pieces, start=1):
            of_part = generators[(part - 1) * per_part : part * per_part]
            # processes exchange gradients with the last part
            alone = isinstance(network, DistributedDataParallel) and part < parts
            with network.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    output = network(images)
                    total, terms, counts = objective(output, labels, of_part)
                scaler.scale(total / parts).backward()
            for whole, values in zip(means, ({"loss": total, **terms}, counts), strict=True):
                for name, value in values.items():
                    whole[name] = whole.get(name, 0) + value.detach() / parts
        return *means, (images, labels, output.logits.detach())

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
        dtype = DTYPE.get(self.settings.precision, torch.float32)
        images = batch.images.to(self.world.device, dtype, non_blocking=True)
        images = images.contiguous(memory_format=layout)
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
            steps_per_epoch=math.ceil(len(self.dataset) / settings.batch_size),
        )

    def _wrap(self, model: nn.Module) -> nn.Module:
        network: nn.Module = model
        if self.settings.compile:
            network = torch.compile(model)  # type: ignore[assignment]
        if self.world.size > 1:
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            with warnings.catch_warnings():  # PyTorch's new name for the argument is not in older releases
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                network = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
            convert_sync_batchnorm(model)  # after DDP, which refuses synchronised norms on CPUs
        return network

    def _log(self, done: int, lr: float, values: dict[str, Tensor]) -> dict[str, float]:
        device = self.world.device
        means = all_mean(torch.stack([v.detach().to(device, torch.float64) for v in values.values()]))
        row = {"step": done, "lr": lr, **dict(zip(values, means.tolist(), strict=True))}
        self.history.append(row)
        return row

    def _observe(self, snapshot: Snapshot) -> None:
        if self.world.is_main:
            for observer in self.observers:
                observer(snapshot)

    def _save(self, done: int, parts: dict[str, Any], seconds: float) -> None:
        self.sessions[-1]["seconds"] = seconds
        if not self.world.is_main:
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"history": self.history, "sessions": self.sessions}
        save_checkpoint(self.checkpoints, done, state, self._fingerprint())

    def _resume(self, parts: dict[str, Any]) -> int:
        found = load_checkpoint(self.checkpoints, self._fingerprint(), self.world.device)
        step, state = found or (0, {})
        if self.world.smallest(step) != self.world.largest(step):
            raise MscsError(
                f"the processes of this training see different checkpoints in {self.checkpoints} (here step "
                f"{step}); do all machines share this folder?"
            )
        if found is not None:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.history[:], self.sessions[:] = state["history"], state["sessions"]
            if self.world.is_main:
                print(f"{self.settings.run} seed {self.seed}: going on from step {step}", flush=True)
        self.sessions.append(
            {"start": step, "seconds": 0.0, "world_size": self.world.size, "started": time.time()}
        )
        return step

    def _fingerprint(self) -> dict[str, Any]:
        return {**self.settings.phase("train"), "seed": self.seed}


def freeze_batch_norm(network: nn.Module) -> None:
    """Let every batch norm use its running statistics, and leave them as they are; affine parts train on."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the 2-norm over all gradients of a model, a scalar on its device."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


class _FiniteGuard:
    """Finds the first non-finite term without waiting for the GPU at every step."""

    _NEVER = 2**62

    def __init__(self, world: World, folder: Path, seed: int):
        self._world, self._folder, self._seed = world, folder, seed
        self._first_bad = torch.full((), self._NEVER, dtype=torch.long, device=world.device)
        self._recent: deque[tuple[int, list[str], dict[str, Tensor]]] = deque()
        self._eager = world.device.type == "cpu"

    def watch(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        values = torch.stack([value.to(terms["loss"]) for value in terms.values()])
        bad = ~values.isfinite().all()
        self._first_bad = torch.where(bad, self._first_bad.clamp(max=batch.step), self._first_bad)
        self._recent.append((batch.step, batch.ids, terms))
        if self._eager:
            self.check()

    def check(self) -> None:
        """Raise MscsError naming term, step and images where a value was not finite on any process.

        A bad term makes everyone's gradient bad: a process whose own terms are sound names that one.
        """
        step = self._world.smallest(int(self._first_bad))
        recent, self._recent = self._recent, deque()
        for seen, ids, terms in recent:
            if seen == step:
                self._fail(step, ids, {name: float(value) for name, value in terms.items()})

    def _fail(self, step: int, ids: list[str], terms: dict[str, float]) -> None:
        name = next((k for k in reversed(terms) if not math.isfinite(terms[k])), None)
        if name is None:
            raise MscsError(f"a term of the loss is not finite at step {step} on another process")
        newest = max(map(str, self._folder.glob("step-*.pt")), default=None)
        rank = self._world.rank
        report = self._folder / (f"failure-{rank}.json" if rank else "failure.json")
        facts = {"term": name, "step": step, "images": ids, "seed": self._seed, "last_checkpoint": newest}
        write_json(report, {**facts, "terms": {k: str(v) for k, v in terms.items()}})
        raise MscsError(
            f"loss term {name!r} is {terms[name]} at step {step} (images {', '.join(ids)}); the same command "
            f"comes here again from the last checkpoint, facts in {report}. Lower lr, or train in fp32"
        )


class _Progress:
    """A bar on a terminal, quiet lines elsewhere, and nothing at all beside the main process."""

    def __init__(self, settings: Settings, seed: int, world: World, start: int):
        self._settings, self._device, self._begun = settings, world.device, time.perf_counter()
        self._name, self._speaks = f"{settings.run} seed {seed}", world.is_main
        self._last = (self._begun, start)
        bar = self._speaks and sys.stderr.isatty()
        self._bar = tqdm(
            total=settings.steps, initial=start, desc=self._name, disable=not bar, unit="step", leave=False
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Seconds since this start of the run."""
        return time.perf_counter() - self._begun

    def advance(self) -> None:
        """Count one step."""
        self._bar.update()

    def show(self, row: Mapping[str, float]) -> None:
        """Show one log row, with speed and memory since the last one."""
        if not self._speaks:
            return
        now, step = time.perf_counter(), int(row["step"])
        steps_per_second = (step - self._last[1]) / max(now - self._last[0], 1e-9)
        self._last = (now, step)
        shown = {k: f"{v:.3g}" for k, v in row.items() if not k.startswith(HIDDEN)}
        shown["images/s"] = f"{steps_per_second * self._settings.batch_size:.3g}"
        shown["GiB"] = f"{peak_bytes(self._device) / 2**30:.3g}"
        if not self._bar.disable:
            self._bar.set_postfix(shown, refresh=False)
            return
        left = tqdm.format_interval((self._settings.steps - step) / steps_per_second)
        text = " ".join(f"{key} {value}" for key, value in shown.items())
        print(f"{self._name} step {step}/{self._settings.steps} {text} left {left}", flush=True)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: of its GPU, or of the machine where it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextlib.contextmanager
def _explained(settings: Settings, world: World) -> Iterator[None]:
    """Turn failures of the machine into what to do about them."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MscsError(
            f"the GPU's memory does not hold {settings.batch_size // world.size} images per process "
            f"({str(error).splitlines()[0]}) What helps: {'; '.join(memory_advice(settings, world.size))}"
        ) from error
    except RuntimeError as error:
        if world.size > 1 and is_lost_peer(error):
            raise MscsError(
                "another process of this training was lost; its own message says why. The same command goes "
                "on from the last checkpoint"
            ) from error
        if "DataLoader timed out" in str(error):
            raise MscsError(
                f"no batch came from the processes that read images for {STALLED_SECONDS} s: does the folder "
                "of the dataset hang (network disk)? The same command goes on from the last checkpoint"
            ) from error
        if "DataLoader worker" in str(error):
            raise MscsError(
                f"a process that reads images died ({str(error).splitlines()[0]}). Where memory "
                "or /dev/shm is short, use fewer --workers; the same command goes on from the last checkpoint"
            ) from error
        raise


def memory_advice(settings: Settings, processes: int) -> list[str]:
    """Return what makes a training need less GPU memory, mildest first."""
    advice = []
    if not settings.model_options.get("checkpointing"):
        advice.append("--set model_options={checkpointing: true}: slower, the same result")
    if processes < WORLD_SIZES[-1]:
        part = settings.batch_size // (2 * processes)
        advice.append(f"--processes {2 * processes} on as many GPUs: {part} images each, the same result")
    if settings.precision == "fp32":
        advice.append("--set precision=bf16: activations take half")
    if settings.accumulation_steps * processes < WORLD_SIZES[-1]:
        advice.append(
            f"--set accumulation_steps={2 * settings.accumulation_steps} --set batch_norm=part: half the "
            "images at a time, another model (batch norm sees parts of the batch)"
        )
    if settings.contrastive and settings.sampling == "all":
        advice.append("--set sampling=balanced: no more than max_anchors rows per scale")
    if settings.batch_size > 4:
        batch = settings.batch_size - 4
        advice.append(f"--set batch_size={batch}: {batch / settings.batch_size:.0%} of the images per step")
    if settings.scale_range is not None:
        height, width = (max(32, side * 3 // 4 // 32 * 32) for side in settings.crop_size)
        share = height * width / math.prod(settings.crop_size)
        advice.append(f"--set crop_size=[{height},{width}]: {share:.0%} of the pixels")
    return advice


@dataclass
class _StopFlag:
    signum: int = 0


@contextlib.contextmanager
def _signals() -> Iterator[_StopFlag]:
    """Turn SIGTERM and SIGINT into a flag; the processes agree on it at the end of a step."""
    flag = _StopFlag()

    def remember(signum: int, _frame: object) -> None:
        flag.signum = signum

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


def is_trained(settings: Settings, files: TrainFiles) -> bool:
    """Return whether every seed's weights and the metrics are there, made under these very settings."""
    if not (files.metrics.exists() and files.losses.exists()):
        return False
    try:
        headers = [read_header(files.weights(seed)) for seed in settings.seeds]
    except MscsError:
        return False
    return all(header.get("digest") == settings.digest() for header in headers)


def train_run(
    settings: Settings,
    data_root: Path,
    files: TrainFiles,
    checkpoint_root: Path,
    world: World,
    *,
    workers: int = 0,
    fresh: bool = False,
    observers: Sequence[Observer] = (),
) -> dict[str, Any] | None:
    """Train every seed of a run, write weights, metrics and loss curves; return facts for the run record.

    A run that is trained already is left alone unless `fresh`: None is returned.
    """
    if is_trained(settings, files) and not fresh:
        return None
    apply_machine_settings(settings)
    dataset = open_dataset(settings, "train", data_root)
    root = checkpoint_root / f"{settings.run}-{settings.digest()}"
    metrics: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    sessions: dict[str, list[dict[str, float]]] = {}
    with lock(root) if world.is_main else contextlib.nullcontext():
        if world.is_main:
            _tell_of_others(root, settings)
        if fresh:
            _remove_checkpoints(root, world)
        for seed in settings.seeds:
            trainer = Trainer(
                settings, seed, world, dataset, root / f"seed-{seed}", workers, observers=observers
            )
            header = {"run": settings.run, "digest": settings.digest()}
            _train_seed(trainer, files.weights(seed), header)
            rows += [{"seed": seed, **row} for row in trainer.history]
            metrics[f"seed_{seed}"] = summary(trainer.history)
            sessions[f"seed_{seed}"] = trainer.sessions
        if world.is_main:
            write_csv(files.losses, rows)
            write_json(files.metrics, metrics)
        _remove_checkpoints(root, world)  # only now: a run killed in its second seed keeps its first
    return _facts(settings, world, sessions)


def _train_seed(trainer: Trainer, path: Path, header: dict[str, str]) -> None:
    weights = trainer.train()
    if trainer.world.is_main:
        save_weights(path, weights, header)


def _tell_of_others(root: Path, settings: Settings) -> None:
    """Name the interrupted trainings of this run under other settings, which this one does not go on from."""
    digest = "[0-9a-f]" * len(settings.digest())
    for folder in sorted(root.parent.glob(f"{settings.run}-{digest}")):
        records = sorted(folder.glob("seed-*/step-*.json"))
        if folder != root and records:
            changes = differences(read_json(records[-1])["settings"], settings.phase("train"))
            print(f"{settings.run}: an interrupted training, with other settings ({changes}), is in {folder}")


def _remove_checkpoints(root: Path, world: World) -> None:
    """Remove what was saved, and the unfinished files of saves that were killed."""
    for old in [*root.glob("seed-*/step-*"), *root.glob("seed-*/.step-*")] if world.is_main else ():
        old.unlink()
    barrier()


def _facts(settings: Settings, world: World, sessions: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    starts = [session for seed in sessions.values() for session in seed]
    on_gpu = world.device.type == "cuda"
    return {
        "settings": to_plain(settings),
        "digest": settings.digest(),
        "precision": settings.precision,
        "seeds": settings.seeds,
        "world_size": world.size,
        "started": min(session["started"] for session in starts),
        "seconds": sum(session["seconds"] for session in starts),
        "gpu_hours": sum(s["seconds"] * s["world_size"] for s in starts) / 3600 if on_gpu else None,
        "peak_bytes": peak_bytes(world.device),
        "sessions": sessions,
    }


def summary(history: list[dict[str, float]]) -> dict[str, float | None]:
    """Average every logged value over the last fifth of the log, leaving out fp16's overflown gradients."""
    tail = history[-max(1, len(history) // 5) :]
    means: dict[str, float | None] = {}
    for key in tail[0]:
        if key not in ("step", "lr"):
            values = [row[key] for row in tail if math.isfinite(row[key])]
            means[key] = sum(values) / len(values) if values else None
    return means
