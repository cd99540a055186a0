"""Weights + validation images -> confusion matrix -> scores, as each dataset's protocol has it."""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mscs.checkpoint import read_weights
from mscs.datasets import Dataset, Sample
from mscs.distributed import World, all_sum
from mscs.engine import AUTOCAST, apply_machine_settings, build_network, open_dataset
from mscs.inference import Predictor, Protocol
from mscs.metrics import confusion_matrix, majority_miou, scores
from mscs.models.weights import load_strictly
from mscs.params import Settings
from mscs.transforms import pad_reflect

MODES = {"ss": False, "ms": True}


def build_protocol(settings: Settings) -> Protocol:
    """Return the evaluation protocol that `settings` ask for."""
    return Protocol(
        short_side=settings.short_side,
        pad_multiple=settings.pad_multiple,
        reflect_pad=settings.reflect_pad,
        score_padding=settings.score_padding,
        ms_scales=settings.ms_scales,
        ms_long_side=settings.ms_long_side,
        ms_window=settings.ms_window,
        ms_overlap=settings.ms_overlap,
        ms_border=settings.ms_border,
        ms_merge=settings.ms_merge,
    )


def load_network(settings: Settings, num_classes: int, weights: Path) -> nn.Module:
    """Build the model without projectors and load trained weights, strictly."""
    model = build_network(settings, num_classes, seed=None, projector=False)
    tensors, _ = read_weights(weights)
    load_strictly(model, {k: v for k, v in tensors.items() if not k.startswith("projectors.")})
    return model


def build_predictor(settings: Settings, num_classes: int, weights: Path, device: torch.device) -> Predictor:
    """Return the predictor of a trained run."""
    model = load_network(settings, num_classes, weights)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Predictor(
        model,
        build_protocol(settings),
        device=device,
        autocast=AUTOCAST[settings.precision],
        channels_last=settings.channels_last,
    )


def scored_label(sample: Sample, settings: Settings) -> Tensor:
    """Return the label to score against: with mirrored rows where the protocol counts them."""
    label = pad_reflect(sample.label, settings.reflect_pad) if settings.score_padding else sample.label
    return torch.from_numpy(np.ascontiguousarray(label))


def evaluate_model(
    predictor: Predictor,
    dataset: Dataset,
    settings: Settings,
    world: World,
    *,
    multi_scale: bool,
    on_prediction: Callable[[Sample, np.ndarray], None] | None = None,
) -> Tensor:
    """Return the confusion matrix (K, K) int64 of a split, summed over all processes, on the CPU.

    `on_prediction` gets every sample with its training ids (H, W) uint8 at native size.
    """
    classes, ignored = dataset.num_classes, dataset.ignore_index
    total = torch.zeros(classes, classes, dtype=torch.int64, device=predictor.device)
    for sample in _progress(_share(dataset, world), dataset, settings, world):
        prediction = predictor.scores(sample.image, multi_scale=multi_scale).argmax(0)
        label = scored_label(sample, settings).to(prediction.device)
        total += confusion_matrix(prediction, label, classes, ignored)
        if on_prediction is not None:
            top = settings.reflect_pad[0] if settings.score_padding else 0
            native = prediction[top : top + len(sample.label)]
            on_prediction(sample, native.cpu().numpy().astype(np.uint8))
    return all_sum(total).cpu()


def evaluate_run(
    settings: Settings,
    data_root: Path,
    weights: dict[int, Path],
    world: World,
    *,
    split: str = "val",
    save: Callable[[str, Dataset, Sample, np.ndarray], None] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Evaluate every seed of a run; return scores by mode and seed, and the confusion matrices behind them.

    `save` gets "<mode>-seed-<seed>", the dataset, and every sample with its prediction.
    """
    apply_machine_settings(settings)
    dataset = open_dataset(settings, split, data_root)
    record: dict[str, Any] = {mode: {"seeds": {}} for mode in settings.evaluation}
    matrices: dict[str, np.ndarray] = {}
    for seed, path in weights.items():
        predictor = build_predictor(settings, dataset.num_classes, path, world.device)
        for mode in settings.evaluation:
            name = f"{mode}-seed-{seed}"
            confusion = evaluate_model(
                predictor,
                dataset,
                settings,
                world,
                multi_scale=MODES[mode],
                on_prediction=partial(save, name, dataset) if save is not None else None,
            )
            record[mode]["seeds"][str(seed)] = scores(confusion, settings.absent_classes)
            record["majority_miou"] = majority_miou(confusion, settings.absent_classes)
            matrices[name] = confusion.numpy()
    for mode in settings.evaluation:
        values = [entry["miou"] for entry in record[mode]["seeds"].values()]
        record[mode] = {
            "miou": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "n": len(values),
            **record[mode],
        }
    record["classes"] = list(dataset.classes)
    return record, matrices


def nonzero(matrix: np.ndarray) -> list[list[int]]:
    """Return the filled entries of a confusion matrix as [true class, predicted class, pixels]."""
    return [[int(t), int(p), int(matrix[t, p])] for t, p in zip(*np.nonzero(matrix), strict=True)]


def _share(dataset: Dataset, world: World) -> Iterator[Sample]:
    for index in range(world.rank, len(dataset), world.size):
        yield dataset[index]


def _progress(
    samples: Iterable[Sample], dataset: Dataset, settings: Settings, world: World
) -> Iterable[Sample]:
    quiet = not (world.is_main and sys.stderr.isatty())
    return tqdm(samples, total=len(dataset), desc=f"evaluate {settings.run}", unit="image", disable=quiet)
