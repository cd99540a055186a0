"""The bookkeeping of a run: seeds, locks, weights and the record of what they were made with."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mscs import build
from mscs.checkpoint import differences, lock, prune, read_header, save_weights
from mscs.datasets.base import MANIFEST
from mscs.datasets.spec import GENERATED
from mscs.distributed import World, barrier
from mscs.errors import MscsError
from mscs.evaluation import OnPrediction, count_pixels, evaluate_weights, nonzero
from mscs.job import Job
from mscs.metrics import scores
from mscs.models.pretrained import pretrained_record
from mscs.monitor import peak_bytes
from mscs.paths import SeedFiles, checkpoint_folder
from mscs.provenance import record, utc
from mscs.results import file_sha256, read_mapping, write_csv, write_json
from mscs.settings import Settings
from mscs.train import Trainer


def train_seed(job: Job, seed: int, world: World) -> bool:
    """Train one seed and write weights, record, loss curve and metrics; return False if that was done before.

    The last checkpoint stays until the seed is evaluated: if its files are lost before that, because the
    pipeline did not record its stage, they are made again in seconds.
    """
    settings, files = job.settings, job.files(seed)
    if not job.fresh and is_trained(settings, seed, files, data_digest(job.data_root)):
        return False
    build.apply_machine_settings(settings)
    dataset = build.open_dataset(settings, settings.data.train_split, job.data_root)
    checkpoints = checkpoint_folder(settings, seed)
    with contextlib.ExitStack() as held:
        if world.is_main:
            held.enter_context(lock(files.work / f"seed-{seed}.lock"))
            # two names may stand for the same settings
            held.enter_context(lock(checkpoints.with_name(f"seed-{seed}.lock")))
            if job.overrides:
                write_json(files.variant, job.overrides)
            _tell_of_others(checkpoints, settings)
            if job.fresh:
                prune(checkpoints, keep=0)
        barrier()
        trainer = Trainer(
            settings,
            seed,
            world,
            dataset,
            checkpoints,
            data_digest(job.data_root),
            4 * (world.device.type == "cuda") if job.workers is None else job.workers,
            accept_changed=job.accept_changed,
            observers=job.observers if world.is_main else (),
            validate=_validation(job, world) if settings.machine.validate_every else None,
        )
        weights = trainer.train()
        if world.is_main:
            if files.metrics.exists():  # those of an earlier training, which the rest replaces
                files.metrics.unlink()
            save_weights(files.weights, weights, _header(settings, seed))
            write_json(files.record, record(**_facts(trainer, files)))
            write_csv(files.losses, trainer.history)
            files.validation.unlink(missing_ok=True)
            if trainer.validations:
                write_csv(files.validation, trainer.validations)
            write_json(files.metrics, summary(trainer.history))  # last: it says that the others are there
            prune(checkpoints, keep=1)
        barrier()
    return True


def evaluate_seed(
    job: Job,
    seed: int,
    world: World,
    folder: Path,
    checkpoint: Path | None = None,
    split: str | None = None,
    save: OnPrediction | None = None,
) -> dict[str, Any]:
    """Score one seed, write evaluation.json and confusion.json into `folder`, and return the scores.

    Args:
        job: whose settings and data are used.
        seed: whose weights are scored.
        world: the processes that share the images.
        folder: where the results go.
        checkpoint: weights file in place of the run's own, which have to fit the settings.
        split: of the dataset; None means the one that the settings score.
        save: see `mscs.evaluation.evaluate_weights`.
    """
    settings, files = job.settings, job.files(seed)
    if checkpoint is None:
        check_weights(settings, seed, files)
    record, matrices = evaluate_weights(
        settings, seed, checkpoint or files.weights, job.data_root, world, split=split, save=save
    )
    if checkpoint is None:
        scored = {"digest": settings.digest("evaluate"), "numerics": settings.numerics["evaluate"]}
        record |= {"digest": settings.digest(), "numerics": settings.numerics["train"], "evaluation": scored}
    if world.is_main:
        write_json(folder / "evaluation.json", record)
        write_json(folder / "confusion.json", {name: nonzero(m) for name, m in matrices.items()})
        if checkpoint is None:
            prune(checkpoint_folder(settings, seed), keep=0)
    return record


def _validation(job: Job, world: World) -> Callable[[nn.Module], float]:
    """Return what scores a network, at one scale, on the images that the run is scored on."""
    settings = job.settings
    dataset = build.open_dataset(settings, settings.data.score_split, job.data_root)

    def validate(model: nn.Module) -> float:
        predictor = build.predictor_of(model, settings, world.device)
        confusion = count_pixels(predictor, dataset, settings, world, multi_scale=False)
        return float(scores(confusion, settings.evaluation.absent_classes)["miou"])  # type: ignore[arg-type]

    return validate


def is_trained(settings: Settings, seed: int, files: SeedFiles, data: str | None) -> bool:
    """Return whether all files of a seed's training are there, made under these settings from this data."""
    with contextlib.suppress(MscsError):
        check_weights(settings, seed, files)
        made_from = read_mapping(files.record).get("data", {}).get("digest")
        return made_from == data and files.losses.exists() and files.metrics.exists()
    return False


def data_digest(root: Path) -> str | None:
    """Return the digest over all files of a dataset, from its manifest; None where it has none."""
    manifest = root / MANIFEST
    return read_mapping(manifest)["digest"] if manifest.is_file() else None


def check_weights(settings: Settings, seed: int, files: SeedFiles) -> None:
    """Raise MscsError unless a seed's weights belong to these settings and are as they were written.

    Without a run record (weights from a DVC remote, which checks them itself) only their header is compared.
    """
    retrain = f"train it again with `mscs train {settings.run}`"
    if read_header(files.weights) != _header(settings, seed):
        raise MscsError(
            f"{files.weights} holds weights of other settings, another seed or another version of the code; "
            f"{retrain}"
        )
    if files.record.exists() and read_mapping(files.record).get("weights") != file_sha256(files.weights):
        raise MscsError(
            f"{files.weights} is not the file that {files.record} tells of (damaged or exchanged); {retrain}"
        )


def _header(settings: Settings, seed: int) -> dict[str, Any]:
    digest, numerics = settings.digest(), dict(settings.numerics["train"])
    return {"run": settings.run, "seed": seed, "digest": digest, "numerics": numerics}


def _tell_of_others(checkpoints: Path, settings: Settings) -> None:
    """Name the interrupted trainings of this run under other settings, which this one does not go on from."""
    digest = "[0-9a-f]" * len(settings.digest())
    for folder in sorted(checkpoints.parents[1].glob(f"{settings.run}-{digest}")):
        newest = max(folder.glob("seed-*/step-*.json"), default=None)
        if folder == checkpoints.parent or newest is None:
            continue
        with contextlib.suppress(MscsError, KeyError, TypeError, AttributeError):  # a damaged one is no news
            changes = differences(read_mapping(newest)["settings"], settings.identity("train"))
            print(f"{settings.run}: an interrupted training, with other settings ({changes}), is in {folder}")


def _facts(trainer: Trainer, files: SeedFiles) -> dict[str, Any]:
    settings, world, sessions = trainer.settings, trainer.world, trainer.sessions
    model = settings.model
    on_gpu = world.device.type == "cuda"
    root = trainer.dataset.root
    marker = root / GENERATED
    return {
        "settings": settings.flat(),
        "digest": settings.digest(),
        "seed": trainer.seed,
        "weights": file_sha256(files.weights),
        "precision": settings.machine.precision,
        "world_size": world.size,
        "started": utc(min(session["started"] for session in sessions)),
        "seconds": sum(session["seconds"] for session in sessions),
        "gpu_hours": sum(s["seconds"] * s["world_size"] for s in sessions) / 3600 if on_gpu else None,
        "peak_bytes": peak_bytes(world.device),
        "sessions": sessions,
        "data": {
            "root": str(root),
            "digest": data_digest(root),
            "generated": read_mapping(marker) if marker.is_file() else None,
        },
        "pretrained_weights": pretrained_record(model.backbone, model.initial_weights or model.pretrained),
    }


def summary(history: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Average every logged value over the last fifth of the log, leaving out fp16's overflown gradients."""
    tail = history[-max(1, len(history) // 5) :]
    means: dict[str, float | None] = {}
    for key in tail[0]:
        if key not in ("step", "lr"):
            values = [row[key] for row in tail if math.isfinite(row[key])]
            means[key] = sum(values) / len(values) if values else None
    return means
