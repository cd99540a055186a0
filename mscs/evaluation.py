"""Weights + validation images -> confusion matrix -> scores, as each dataset's protocol has it."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mscs import build
from mscs.datasets import Dataset, Sample
from mscs.distributed import World, all_sum
from mscs.inference import Predictor
from mscs.metrics import confusion_matrix, majority_miou, scores
from mscs.settings import Settings
from mscs.transforms import pad_reflect

OnPrediction = Callable[[str, Dataset, Sample, np.ndarray], None]


def scored_label(sample: Sample, settings: Settings) -> Tensor:
    """Return the label to score against: with mirrored rows where the protocol counts them."""
    rows = settings.data.reflect_pad if settings.evaluation.score_padding else (0, 0)
    return torch.from_numpy(np.ascontiguousarray(pad_reflect(sample.label, rows)))


def count_pixels(
    predictor: Predictor,
    dataset: Dataset,
    settings: Settings,
    world: World,
    *,
    multi_scale: bool,
    on_prediction: Callable[[Sample, np.ndarray], None] | None = None,
) -> Tensor:
    """Return the confusion matrix of a split, (K, K) int64 on the CPU, summed over all processes.

    `on_prediction` gets every sample with its training ids (H, W) uint8 at native size.
    """
    classes = dataset.num_classes
    total = torch.zeros(classes, classes, dtype=torch.int64, device=predictor.device)
    top = settings.data.reflect_pad[0] if settings.evaluation.score_padding else 0
    share = range(world.rank, len(dataset), world.size)
    quiet = not (world.is_main and sys.stderr.isatty())
    for index in tqdm(share, desc=f"evaluate {settings.run}", unit="image", disable=quiet):
        sample = dataset[index]
        prediction = predictor.scores(sample.image, multi_scale=multi_scale).argmax(0)
        label = scored_label(sample, settings).to(prediction.device)
        total += confusion_matrix(prediction, label, classes, dataset.ignore_index)
        if on_prediction is not None:
            native = prediction[top : top + len(sample.label)]
            on_prediction(sample, native.cpu().numpy().astype(np.uint8))
    return all_sum(total).cpu()


def evaluate_weights(
    settings: Settings,
    seed: int,
    weights: Path,
    data_root: Path,
    world: World,
    *,
    split: str | None = None,
    save: OnPrediction | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Score the weights of one seed; return scores by mode and the confusion matrices behind them.

    `save` gets "<mode>-seed-<seed>", the dataset, and every sample with its prediction.
    """
    build.apply_machine_settings(settings)
    dataset = build.open_dataset(settings, split or settings.data.score_split, data_root)
    predictor = build.predictor(settings, dataset.num_classes, weights, world.device)
    record: dict[str, Any] = {}
    matrices: dict[str, np.ndarray] = {}
    for mode in settings.evaluation.modes:
        name = f"{mode}-seed-{seed}"
        keep = partial(save, name, dataset) if save is not None else None
        confusion = count_pixels(
            predictor, dataset, settings, world, multi_scale=mode == "ms", on_prediction=keep
        )
        found = scores(confusion, settings.evaluation.absent_classes)
        record[mode] = {"miou": found["miou"], "std": None, "n": 1, "seeds": {str(seed): found}}
        record["majority_miou"] = majority_miou(confusion, settings.evaluation.absent_classes)
        matrices[name] = confusion.numpy()
    record["classes"] = list(dataset.classes)
    return record, matrices


def nonzero(matrix: np.ndarray) -> list[list[int]]:
    """Return the filled entries of a confusion matrix as [true class, predicted class, pixels]."""
    return [[int(t), int(p), int(matrix[t, p])] for t, p in zip(*np.nonzero(matrix), strict=True)]
