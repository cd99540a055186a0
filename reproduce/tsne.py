"""Fig. 1: the feature space of one network trained without and with the contrastive loss, drawn and measured.

Rules. Features are the maps that the loss acts on, before projection, each pixel's vector normalised to
length 1. A scale is looked at on its own grid, with the label that the loss gives each cell. "All scales"
normalises each scale, resizes it bilinearly to the finest grid, concatenates and normalises again. Pixels of
the validation images are drawn at random, the same ones for both networks and as many of each class, unless a
class has fewer; one with hardly any is left out. The numbers are measured in feature space, never in the
t-SNE plane, and every class counts the same.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from mscs.datasets import Sample
from mscs.errors import MscsError
from mscs.losses.sampling import downsample_labels
from mscs.results import write_json
from mscs.seeding import derive_seed, numpy_generator
from reproduce.style import COLUMN, class_marker, paper_style, point_legend, save
from reproduce.trained import TrainedRun

SEED = 0
NETWORKS = ("without the contrastive loss", "with the contrastive loss")
ALL_SCALES = "all scales"
PER_CLASS = 50
PER_CLASS_OF_SCALE = 20
LEAST_PER_CLASS = 8
NEIGHBOURS = 5


@dataclass(frozen=True)
class Points:
    """Sampled pixels: features (N, C) of length 1, class (N,), number of the image that each is from (N,)."""

    features: np.ndarray
    classes: np.ndarray
    images: np.ndarray


def write_tsne(baseline: TrainedRun, ours: TrainedRun, folder: Path, stamp: str) -> None:
    """Write fig1.png, fig1.pdf, fig1-scales.png and fig1.json into `folder`."""
    sampled = dict(zip(NETWORKS, map(sample_pixels, (baseline, ours)), strict=True))
    measured = {
        run: {space: separation(points) for space, points in spaces.items()}
        for run, spaces in sampled.items()
    }
    dataset = baseline.dataset()
    classes = sampled[NETWORKS[0]][ALL_SCALES].classes
    counts = {dataset.classes[i]: int((classes == i).sum()) for i in np.unique(classes)}
    write_json(folder / "fig1.json", {**measured, "points": counts})
    # one thread for each embedding: so few points gain nothing from more
    with threadpool_limits(1), ThreadPoolExecutor(2) as pool:
        planes = {
            run: dict(zip(spaces, pool.map(embed, spaces.values()), strict=True))
            for run, spaces in sampled.items()
        }
    with paper_style():
        _draw(sampled, planes, measured, dataset.classes, dataset.colors, folder, stamp)


def sample_pixels(run: TrainedRun) -> dict[str, Points]:
    """Return balanced points of all scales together and of every scale that shows two classes, by name."""
    dataset = run.dataset()
    pools: dict[str, list[Points]] = {}
    for number in range(len(dataset)):
        sample = dataset[number]
        for space, grid in spaces_of(run.features(sample), sample).items():
            pools.setdefault(space, []).append(_draw_from(grid, run.label(sample), space, number))
    found = {space: balance(_join(parts), space) for space, parts in pools.items()}
    found = {space: points for space, points in found.items() if len(np.unique(points.classes)) > 1}
    if ALL_SCALES not in found:
        raise MscsError(
            f"{run.settings.run}: the validation images show fewer than two classes with at least "
            f"{LEAST_PER_CLASS} pixels of the finest feature map; use more or larger images"
        )
    return found


def spaces_of(maps: list[Tensor], sample: Sample) -> dict[str, Tensor]:
    """Return feature grids (C, h, w) of length 1 per pixel: all scales concatenated, then each scale."""
    height = sample.label.shape[0]
    unit = [F.normalize(x, dim=0) for x in maps]
    size = unit[0].shape[-2:]
    resized = [F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0] for x in unit]
    strides = [2 ** round(np.log2(height / x.shape[-2])) for x in unit]
    single = {
        f"scale {i}, stride {stride}": x for i, (stride, x) in enumerate(zip(strides, unit, strict=True))
    }
    return {ALL_SCALES: F.normalize(torch.cat(resized), dim=0), **single}


def _limit(space: str) -> int:
    return PER_CLASS if space == ALL_SCALES else PER_CLASS_OF_SCALE


def _draw_from(grid: Tensor, label: np.ndarray, space: str, number: int) -> Points:
    """Draw up to the limit of pixels per class from one image."""
    cells = downsample_labels(torch.from_numpy(label)[None], *grid.shape[-2:])[0].numpy().ravel()
    random = numpy_generator(SEED, "tsne", space, number)
    order = random.permutation(len(cells))
    rank = _rank_within_class(cells[order])
    chosen = order[(rank < _limit(space)) & (cells[order] != 255)]
    features = grid.flatten(1)[:, torch.from_numpy(chosen)].T.numpy()
    return Points(features, cells[chosen].astype(np.int64), np.full(len(chosen), number))


def balance(points: Points, space: str) -> Points:
    """Keep up to the limit of random points per class, no class with fewer than `LEAST_PER_CLASS`."""
    random = numpy_generator(SEED, "tsne", space, "balance")
    values, sizes = np.unique(points.classes, return_counts=True)
    enough = np.isin(points.classes, values[sizes >= LEAST_PER_CLASS])
    order = random.permutation(np.flatnonzero(enough))
    order = order[_rank_within_class(points.classes[order]) < _limit(space)]
    order = order[np.argsort(points.classes[order], kind="stable")]
    return Points(points.features[order], points.classes[order], points.images[order])


def _rank_within_class(classes: np.ndarray) -> np.ndarray:
    """Return for each entry how many earlier entries have its class."""
    order = np.argsort(classes, kind="stable")
    ordered = classes[order]
    rank = np.empty(len(classes), np.int64)
    rank[order] = np.arange(len(classes)) - np.searchsorted(ordered, ordered)
    return rank


def _join(parts: list[Points]) -> Points:
    fields = ("features", "classes", "images")
    return Points(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def separation(points: Points) -> dict[str, float]:
    """Return how well classes are separated, each class counting the same.

    knn_accuracy: percent of points whose class leads among their nearest neighbours in other images (those
    of the same image lie next to them); silhouette: -1 to 1, with cosine distance; distance_ratio: mean
    cosine distance within a class over that between classes, smaller is better.
    """
    classes = points.classes
    distance = 1 - points.features.astype(np.float64) @ points.features.T.astype(np.float64)
    np.fill_diagonal(distance, 0)
    distance = distance.clip(0)
    values, index = np.unique(classes, return_inverse=True)
    member = np.eye(len(values))[index]
    sizes = member.sum(0)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    means = member.T @ distance @ member / pairs
    within = float(np.diag(means).mean())
    between = float(means[~np.eye(len(values), dtype=bool)].mean())
    silhouettes = silhouette_samples(distance, classes, metric="precomputed")
    hits = _knn_hits(distance, index, points.images)
    found = {
        "knn_accuracy": 100 * float((member.T @ hits / sizes).mean()),
        "silhouette": float((member.T @ silhouettes / sizes).mean()),
        "distance_ratio": within / between,
    }
    # the last digits depend on the number of threads that form the sums
    return {name: round(value, 6) for name, value in found.items()}


def _knn_hits(distance: np.ndarray, index: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return 1 where the nearest points of other images vote for the right class; ties go to the nearer."""
    distance = np.where(images[:, None] == images[None], np.inf, distance)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :NEIGHBOURS]
    votes = np.zeros((len(index), index.max() + 1))
    for place in range(nearest.shape[1]):
        votes[np.arange(len(index)), index[nearest[:, place]]] += 1 - 1e-3 * place
    return (votes.argmax(1) == index).astype(float)


def embed(points: Points) -> np.ndarray:
    """Return the t-SNE coordinates (N, 2)."""
    seed = derive_seed(SEED, "tsne", "embedding") % 2**32
    perplexity = min(30.0, (len(points.classes) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, max_iter=400, random_state=seed).fit_transform(
        points.features
    )


def _draw(
    sampled: Mapping[str, Mapping[str, Points]],
    planes: Mapping[str, Mapping[str, np.ndarray]],
    measured: Mapping[str, Mapping[str, Mapping[str, float]]],
    classes: tuple[str, ...],
    colors: np.ndarray,
    folder: Path,
    stamp: str,
) -> None:
    runs = list(sampled)
    shown = [int(i) for i in np.unique(sampled[runs[0]][ALL_SCALES].classes)]
    legend = {"handles": point_legend(classes, colors, shown), "loc": "center left", "handletextpad": 0.1}
    figure, axes = plt.subplots(2, 1, figsize=(COLUMN, 5.9))
    for axis, run in zip(axes, runs, strict=True):
        _scatter(axis, sampled[run][ALL_SCALES], planes[run][ALL_SCALES], colors, 9)
        axis.set_title(f"{run}\n{_numbers(measured[run]['all scales'])}", loc="left")
    figure.subplots_adjust(left=0.01, right=0.77, top=0.94, bottom=0.03, hspace=0.16)
    figure.legend(**legend, bbox_to_anchor=(0.77, 0.5), labelspacing=0.75)
    save(figure, folder, "fig1", stamp)
    plt.close(figure)

    spaces = [space for space in sampled[runs[0]] if space != ALL_SCALES]
    figure, grid = plt.subplots(2, len(spaces), figsize=(COLUMN * 1.5, 4.6), squeeze=False)
    for row, run in zip(grid, runs, strict=True):
        row[0].set_ylabel(run)
        for axis, space in zip(row, spaces, strict=True):
            _scatter(axis, sampled[run][space], planes[run][space], colors, 4)
            axis.set_title(f"{space}\n{_numbers(measured[run][space], short=True)}", fontsize=5.5)
    figure.subplots_adjust(left=0.03, right=0.99, top=0.93, bottom=0.14, hspace=0.22, wspace=0.04)
    legend |= {"loc": "lower center", "ncols": 10, "columnspacing": 1.0}
    figure.legend(**legend, bbox_to_anchor=(0.5, 0.03))
    save(figure, folder, "fig1-scales", stamp, formats=("png",))
    plt.close(figure)


def _scatter(axis: Axes, points: Points, plane: np.ndarray, colors: np.ndarray, size: float) -> None:
    for index in np.unique(points.classes):
        chosen = plane[points.classes == index]
        color = [colors[index] / 255]
        axis.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=size,
            c=color,
            marker=class_marker(index),
            linewidths=0.2,
            edgecolors="white",
        )
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_color("#bbbbbb")


def _numbers(values: Mapping[str, float], short: bool = False) -> str:
    knn, silhouette, ratio = (values[key] for key in ("knn_accuracy", "silhouette", "distance_ratio"))
    if short:
        return f"{NEIGHBOURS}-NN {knn:.1f} %, silh. {silhouette:+.2f}, ratio {ratio:.2f}"
    text = f"{NEIGHBOURS}-NN accuracy {knn:.1f} %, silhouette {silhouette:+.2f}"
    return f"{text}, intra/inter distance {ratio:.2f}"
