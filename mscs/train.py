"""The training loop: batch, forward, named loss terms, backward, step, log, save.

A run is a function of its settings and its seed alone. Loss terms are computed per group of images (the
paper's images per GPU) and averaged, batch norm runs over the whole batch, the data order and every random
choice come from (seed, step or sample): so any number of processes trains the same model, and a resumed run
ends where an uninterrupted one would. Masks of dropout and drop-path depend on (seed, step, rank): with
those, another number of processes gives another draw of the same distribution.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mscs import build
from mscs.checkpoint import load_checkpoint, save_checkpoint
from mscs.datasets import Dataset
from mscs.distributed import World, all_mean
from mscs.errors import MscsError
from mscs.job import Observer
from mscs.loader import Batch, train_loader
from mscs.losses.objective import Objective
from mscs.models.sync_batchnorm import convert_sync_batchnorm, freeze_batch_norm
from mscs.monitor import FiniteGuard, Progress, Stopped, explained, signals
from mscs.optim import gradient_norm
from mscs.seeding import derive_seed, torch_generator
from mscs.settings import Settings


@dataclass
class Trainer:
    """One run with one seed, from step 0 or a checkpoint to its last step."""

    settings: Settings
    seed: int
    world: World
    dataset: Dataset
    checkpoints: Path
    data_digest: str | None = None
    """Of the files that the run is trained on: a checkpoint made from others is refused."""
    workers: int = 0
    accept_changed: bool = False
    """Go on from a checkpoint that another version of the code has written."""
    observers: Sequence[Observer] = ()
    validate: Callable[[nn.Module], float] | None = None
    """Returns the network's mIoU in percent; for the log."""
    history: list[dict[str, float]] = field(default_factory=list)
    sessions: list[dict[str, float]] = field(default_factory=list)
    """Of every start of this run so far: when (seconds since 1970), with how many processes, its first step,
    and its seconds until the last checkpoint."""
    validations: list[dict[str, float]] = field(default_factory=list)
    """Step and mIoU of every validation so far."""

    def train(self) -> dict[str, Tensor]:
        """Train to the end and return the model's weights, projectors included."""
        settings, world = self.settings, self.world
        with explained(settings, world):
            model = build.network(settings, self.dataset.num_classes, seed=self.seed).to(world.device)
            parts = {
                "model": model,
                "optimizer": build.optimizer(settings, model, fused=world.device.type == "cuda"),
                "objective": build.objective(settings, self.dataset.class_weights).to(world.device),
                "scaler": torch.amp.GradScaler(
                    world.device.type, enabled=settings.machine.precision == "fp16"
                ),
            }
            start = self._resume(parts)
            network = self._wrap(model)
            with signals() as stop:
                self._loop(start, network, parts, stop)
        return model.state_dict()

    def _loop(self, start: int, network: nn.Module, parts: dict[str, Any], stop: list[int]) -> None:
        steps, machine, world = self.settings.schedule.steps, self.settings.machine, self.world
        optimizer, scaler = parts["optimizer"], parts["scaler"]
        learning_rate = build.learning_rate_of(self.settings, len(self.dataset))
        guard = FiniteGuard(world, self.checkpoints, self.seed)
        progress = Progress(self.settings, self.seed, world, start)
        network.train()
        if self.settings.schedule.batch_norm == "frozen":
            freeze_batch_norm(network)
        for batch in self._batches(start):
            done = batch.step + 1
            lr = learning_rate(batch.step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(derive_seed(self.seed, "dropout", batch.step, world.rank))
            optimizer.zero_grad(set_to_none=True)
            terms, counts = self._accumulate_gradients(batch, network, parts["objective"], scaler)
            scaler.unscale_(optimizer)
            norm = {"gradient_norm": gradient_norm(parts["model"])}
            # in fp16 an overflow of the gradient is no failure: the scaler skips the step
            guard.watch(batch, terms if scaler.is_enabled() else norm | terms)
            scaler.step(optimizer)
            scaler.update()
            if done % machine.log_every == 0 or done == steps:
                guard.check()
                progress.show(self._log(done, lr, terms | counts | norm))
                for observer in self.observers if world.is_main else ():
                    observer(self.seed, self.history)
            if machine.validate_every and done % machine.validate_every == 0:
                self._validate(done, parts["model"])
            signum = world.largest(max(stop, default=0))
            if signum or done == steps or done % machine.checkpoint_every == 0:
                guard.check()
                self._save(done, parts, progress.seconds)
            if signum:
                raise Stopped(signum, done)
        signum = world.largest(max(stop, default=0))  # one that came during the last save
        if signum:
            raise Stopped(signum, steps)

    def _accumulate_gradients(
        self, batch: Batch, network: nn.Module, objective: Objective, scaler: torch.amp.GradScaler
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add the gradients of a batch, part by part, to those that the parameters hold.

        Returns the loss and its terms, and the anchor counts, as means over the parts.
        """
        parts, device = self.settings.schedule.accumulation_steps, self.world.device
        generators = self._generators(batch.step)
        per_part = len(generators) // parts
        dtype = build.AUTOCAST[self.settings.machine.precision]
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
        return means

    def _batches(self, start: int) -> Iterator[Batch]:
        return train_loader(
            self.dataset,
            build.train_transform(self.settings),
            batch_size=self.settings.schedule.batch_size,
            seed=self.seed,
            num_steps=self.settings.schedule.steps,
            start_step=start,
            rank=self.world.rank,
            world_size=self.world.size,
            num_workers=self.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self.world.device, build.dtype_of(self.settings), non_blocking=True)
        images = images.contiguous(memory_format=build.memory_format_of(self.settings))
        return images, batch.labels.to(self.world.device, non_blocking=True)

    def _generators(self, step: int) -> list[torch.Generator]:
        """Return one generator per local group, a function of (seed, step, global group index), on the CPU.

        So the same pixels are drawn on every device.
        """
        per_process = self.settings.schedule.groups // self.world.size
        first = self.world.rank * per_process
        return [torch_generator(self.seed, "anchors", step, first + i) for i in range(per_process)]

    def _wrap(self, model: nn.Module) -> nn.Module:
        network: nn.Module = model
        if self.settings.machine.compile:
            network = torch.compile(model)  # type: ignore[assignment]
        if self.world.size > 1:
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            with warnings.catch_warnings():  # PyTorch's new name for the argument is not in older releases
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                network = DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
            convert_sync_batchnorm(model)  # after DDP, which refuses synchronised norms on CPUs
        return network

    def _validate(self, done: int, model: nn.Module) -> None:
        """Score the network, draw no random number, and leave every module in the mode that it was in."""
        if self.validate is None:
            return
        modes = {module: module.training for module in model.modules()}
        miou = self.validate(model)
        for module, training in modes.items():
            module.training = training
        self.validations.append({"step": done, "miou": miou})
        if self.world.is_main:
            print(f"{self.settings.run} seed {self.seed} step {done} validation mIoU {miou:.2f}", flush=True)

    def _log(self, done: int, lr: float, values: dict[str, Tensor]) -> dict[str, float]:
        device = self.world.device
        means = all_mean(torch.stack([v.detach().to(device, torch.float64) for v in values.values()]))
        row = {"step": done, "lr": lr, **dict(zip(values, means.tolist(), strict=True))}
        self.history.append(row)
        return row

    def _save(self, done: int, parts: dict[str, Any], seconds: float) -> None:
        self.sessions[-1]["seconds"] = seconds
        if not self.world.is_main:
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"history": self.history, "sessions": self.sessions, "validations": self.validations}
        save_checkpoint(self.checkpoints, done, state, self._identity())

    def _resume(self, parts: dict[str, Any]) -> int:
        found = load_checkpoint(
            self.checkpoints, self._identity(), self.world.device, accept_changed=self.accept_changed
        )
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
            self.validations[:] = state.get("validations", [])  # which older checkpoints lack
            if self.world.is_main:
                print(f"{self.settings.run} seed {self.seed}: going on from step {step}", flush=True)
        self.sessions.append(
            {"start": step, "seconds": 0.0, "world_size": self.world.size, "started": time.time()}
        )
        return step

    def _identity(self) -> dict[str, Any]:
        identity = self.settings.identity("train")
        return {**identity, "seed": self.seed, "data_digest": self.data_digest}
