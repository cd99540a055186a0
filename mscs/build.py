"""From settings to parts: dataset, transform, network, objective, optimizer, predictor.

The only place that knows both. Training, evaluation and figures build what they need here; a part is built
from its own block of settings.
"""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mscs.checkpoint import read_weights
from mscs.datasets import Dataset, build_dataset
from mscs.errors import MscsError, UsageError
from mscs.inference import Predictor, Protocol
from mscs.losses import MultiScaleContrastiveLoss
from mscs.losses.objective import ContrastiveTerms, EmbeddingLoss, Objective
from mscs.models import SegmentationModel, build_model
from mscs.models.weights import load_fitting, load_strictly
from mscs.modules import load
from mscs.optim import build_optimizer, learning_rate
from mscs.seeding import derive_seed
from mscs.settings import Contrastive, OwnLoss, Settings
from mscs.transforms import Photometric, TrainTransform, color_jitter, photometric_distortion

AUTOCAST = {"fp64": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PHOTOMETRIC: dict[str, Photometric | None] = {
    "jitter": color_jitter,
    "photometric": photometric_distortion,
    "none": None,
}


def apply_machine_settings(settings: Settings) -> None:
    """Set PyTorch's process-wide switches: threads, TF32, determinism."""
    machine = settings.machine
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    torch.backends.cuda.matmul.allow_tf32 = machine.tf32
    torch.backends.cudnn.allow_tf32 = machine.tf32
    torch.backends.cudnn.benchmark = not machine.deterministic
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
    torch.use_deterministic_algorithms(machine.deterministic, warn_only=True)
    # filling fresh memory guards against reads before writes, which no operation here does, at twice the time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def open_dataset(settings: Settings, split: str, root: Path) -> Dataset:
    """Open one split of the dataset of a run."""
    data = settings.data
    options = {"exclude_blacklisted": True} if data.skip_wrong_labels else {}
    return build_dataset(data.spec, split, root, data.task, **options)


def train_transform(settings: Settings) -> TrainTransform:
    """Return the training transform; without a range of scales the whole image is shown."""
    augmentation = settings.data.augmentation
    whole = augmentation.scale_range is None
    return TrainTransform(
        **augmentation.arguments("scale_range", "color"),
        crop_size=None if whole else settings.schedule.crop_size,
        scale_range=augmentation.scale_range or (1.0, 1.0),
        photometric=PHOTOMETRIC[augmentation.color],
        reflect_pad=settings.data.reflect_pad,
    )


def dtype_of(settings: Settings) -> torch.dtype:
    """Return the dtype of weights and images."""
    return torch.float64 if settings.machine.precision == "fp64" else torch.float32


def memory_format_of(settings: Settings) -> torch.memory_format:
    """Return the memory format of weights and images."""
    return torch.channels_last if settings.machine.channels_last else torch.contiguous_format


def network(
    settings: Settings, num_classes: int, *, seed: int | None, projector: bool = True
) -> SegmentationModel:
    """Build the model; its random weights are a function of the seed (None: weights will be loaded).

    `initial_weights` replace what they have of the model: all of the backbone, and of the rest what fits.
    """
    model = settings.model
    if seed is not None:
        torch.manual_seed(derive_seed(seed, "weights"))
    built = build_model(
        load(model.name) if ":" in model.name else model.name,
        model.backbone,
        num_classes,
        projector=settings.loss.projector if projector else None,
        pretrained=model.pretrained if seed is not None and model.initial_weights is None else False,
        **model.options,
    )
    maps = 1 if settings.loss.projector == "concat" else model.feature_maps
    if built.projectors is not None and len(built.projectors) != maps:
        raise UsageError(
            f"{model.name} on {model.backbone} has {len(built.projectors)} feature maps for the loss, the "
            f"settings say {maps}; use --set feature_maps={len(built.projectors)}"
        )
    if seed is not None and model.initial_weights is not None:
        load_fitting(built, read_weights(model.initial_weights)[0], model.initial_weights)
    return built.to(dtype=dtype_of(settings), memory_format=memory_format_of(settings))  # type: ignore[call-overload]


def contrastive_terms(block: Contrastive, images_per_group: int) -> EmbeddingLoss:
    """Return the paper's loss on embeddings."""
    arguments = block.arguments("embedding_subsample")
    loss = MultiScaleContrastiveLoss(**arguments, images_per_group=images_per_group)
    return ContrastiveTerms(loss, block.embedding_subsample)


def own_loss(block: OwnLoss, _images_per_group: int) -> EmbeddingLoss:
    """Return a loss on embeddings of the user's own."""
    kind = load(block.embedding_loss)
    if not (isinstance(kind, type) and issubclass(kind, EmbeddingLoss)):
        raise UsageError(f"embedding_loss {block.embedding_loss} is no mscs.losses.objective.EmbeddingLoss")
    try:
        return kind(**block.loss_options)
    except TypeError as error:
        raise UsageError(
            f"{block.embedding_loss} with loss_options {dict(block.loss_options)}: {error}"
        ) from error


EMBEDDING_LOSSES: dict[str, Callable[[Any, int], EmbeddingLoss]] = {
    "contrastive": contrastive_terms,
    "embedding_loss": own_loss,
}
"""By the name of their block in `mscs.settings.Loss`: from block and images per group to the loss."""


def objective(settings: Settings, class_weights: Sequence[float] | None) -> Objective:
    """Return the training objective; the dataset's `class_weights` are used if the settings say so."""
    per_group = settings.schedule.images_per_group
    blocks = {name: getattr(settings.loss, name) for name in EMBEDDING_LOSSES}
    return Objective(
        per_group,
        settings.model.aux_weight,
        torch.tensor(class_weights) if settings.data.class_weighted else None,
        [EMBEDDING_LOSSES[name](block, per_group) for name, block in blocks.items() if block is not None],
    )


def optimizer(settings: Settings, model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    """Return the optimizer of a model's parameters."""
    schedule = settings.schedule
    return build_optimizer(
        model.named_parameters(),
        schedule.optimizer.name,
        lr=schedule.lr,
        weight_decay=schedule.weight_decay,
        fused=fused,
        **schedule.optimizer.arguments(),
    )


def learning_rate_of(settings: Settings, num_images: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the step; an epoch counts its incomplete batch."""
    schedule = settings.schedule
    return partial(
        learning_rate,
        lr=schedule.lr,
        schedule=schedule.lr_schedule.name,
        steps=schedule.steps,
        steps_per_epoch=math.ceil(num_images / schedule.batch_size),
        **schedule.lr_schedule.arguments(),
    )


def trained_network(settings: Settings, num_classes: int, weights: Path) -> SegmentationModel:
    """Build the model without projectors and load trained weights, strictly."""
    model = network(settings, num_classes, seed=None, projector=False)
    tensors: dict[str, Tensor] = read_weights(weights)[0]
    own = model.state_dict()
    for name in own.keys() & tensors.keys():
        if own[name].is_floating_point() != tensors[name].is_floating_point():
            raise MscsError(f"weights {weights}: {name} is {tensors[name].dtype}, not {own[name].dtype}")
    load_strictly(model, {k: v for k, v in tensors.items() if not k.startswith("projectors.")})
    return model


def predictor(settings: Settings, num_classes: int, weights: Path, device: torch.device) -> Predictor:
    """Return a trained network behind its dataset's evaluation protocol."""
    return predictor_of(trained_network(settings, num_classes, weights), settings, device)


def predictor_of(model: nn.Module, settings: Settings, device: torch.device) -> Predictor:
    """Return a network, which is put into evaluation mode, behind its dataset's evaluation protocol."""
    return Predictor(
        model,
        protocol(settings),
        device=device,
        autocast=AUTOCAST[settings.machine.precision],
        channels_last=settings.machine.channels_last,
    )


def protocol(settings: Settings) -> Protocol:
    """Return the evaluation protocol."""
    evaluation = settings.evaluation
    multi_scale = evaluation.multi_scale.arguments() if evaluation.multi_scale is not None else {}
    return Protocol(
        **evaluation.arguments("modes", "absent_classes"),
        reflect_pad=settings.data.reflect_pad,
        **multi_scale,
    )
