"""Fig. 1: the feature space of one network trained without and with the contrastive loss, drawn and measured.

The picture (fig1) follows the authors' code: the backbone's map at stride 4 as it is, neither projected nor
normalised, with the label of each cell. The validation images are gone through in order; each gives a few
random pixels of every class, until a class has enough. 50 principal components, then t-SNE with perplexity
30. Which stride the paper shows is not said; 4 is the default of the authors' class. Unlike theirs, t-SNE
starts from the principal components and is the Barnes-Hut approximation.

Not in the paper: fig1-scales and the numbers. Features are the maps that the loss acts on, before projection,
each pixel's vector normalised to length 1. A scale is looked at on its own grid, with the label that the loss
gives each cell. "All scales" normalises each scale, resizes it bilinearly to the finest grid, concatenates
and normalises again. Pixels are drawn at random from all images, as many of each class, unless a class has
fewer; one with hardly any is left out. The numbers are measured in feature space, never in the t-SNE plane,
and every class counts the same.

Both networks are shown and measured on the same pixels.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from sklearn.decomposition import PCA
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
from mscs.transforms import IGNORE_INDEX
from reproduce.style import COLUMN, class_marker, paper_style, point_legend, save
from reproduce.trained import TrainedRun

SEED = 0
NETWORKS = ("without the contrastive loss", "with the contrastive loss")
RAW = "stride 4, as it is"
ALL_SCALES = "all scales"
PER_CLASS = 50
PER_CLASS_OF_SCALE = 20
LEAST_PER_CLASS = 8
NEIGHBOURS = 5
PERPLEXITY = 30.0
ITERATIONS = 400
COMPONENTS = 50


@dataclass(frozen=True)
class Picture:
    """How much fig1 shows: points of a class, those of one image, and iterations of t-SNE.

    per_image: of a frequent class and of a rare one (training id 15 or more: from bus on, on Cityscapes).
    """

    per_class: int
    per_image: tuple[int, int]
    iterations: int


AUTHORS = Picture(per_class=1000, per_image=(2, 10), iterations=2000)
# A dozen small images and a minute: enough to see that the figure is drawn.
MINI = Picture(per_class=50, per_image=(6, 6), iterations=ITERATIONS)
FIRST_RARE_CLASS = 15


@dataclass(frozen=True)
class Points:
    """Sampled pixels: features (N, C), class (N,), number of the image that each is from (N,)."""

    features: np.ndarray
    classes: np.ndarray
    images: np.ndarray


def write_tsne(baseline: TrainedRun, ours: TrainedRun, folder: Path, stamp: str) -> None:
    """Write fig1.png, fig1.pdf, fig1-scales.png and fig1.json into `folder`."""
    picture = MINI if baseline.settings.profile == "mini" else AUTHORS
    sampled = {
        name: sample_pixels(run, picture) for name, run in zip(NETWORKS, (baseline, ours), strict=True)
    }
    measured = {
        run: {space: separation(points) for space, points in spaces.items() if space != RAW}
        for run, spaces in sampled.items()
    }
    dataset = baseline.dataset()
    counts = {
        space: {dataset.classes[i]: int((points.classes == i).sum()) for i in np.unique(points.classes)}
        for space, points in sampled[NETWORKS[0]].items()
    }
    drawn = {
        "features": RAW,
        "points": counts[RAW],
        "per_class": picture.per_class,
        "iterations": picture.iterations,
        "perplexity": PERPLEXITY,
    }
    write_json(folder / "fig1.json", {**measured, "points": counts[ALL_SCALES], "picture": drawn})
    # one thread for each embedding; those of the picture come first, side by side
    order = sorted(((run, space) for run in sampled for space in sampled[run]), key=lambda x: x[1] != RAW)
    with threadpool_limits(1), ThreadPoolExecutor(2) as pool:
        coordinates = pool.map(
            lambda key: embed(sampled[key[0]][key[1]], picture.iterations if key[1] == RAW else ITERATIONS),
            order,
        )
        planes = dict(zip(order, coordinates, strict=True))
    with paper_style():
        _draw(sampled, planes, measured, dataset.classes, dataset.colors, folder, stamp)


def sample_pixels(run: TrainedRun, picture: Picture) -> dict[str, Points]:
    """Return the points of the picture, and balanced ones of all scales together and of every scale, by name.

    A scale that shows fewer than two classes is left out.
    """
    dataset = run.dataset()
    pools: dict[str, list[Points]] = {}
    for number in range(len(dataset)):
        sample = dataset[number]
        maps, label = run.features(sample), run.label(sample)
        for space, grid in {RAW: maps[0], **spaces_of(maps, sample)}.items():
            limits = _limits(space, picture)
            pools.setdefault(space, []).append(_draw_from(grid, label, limits, space, number))
    raw = _first_of_each_class(_join(pools.pop(RAW)), picture.per_class)
    found = {space: balance(_join(parts), space) for space, parts in pools.items()}
    found = {RAW: raw, **found}
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


def _limits(space: str, picture: Picture) -> np.ndarray:
    """Return for every training id how many pixels of it one image may give; 0 for the ignored one."""
    limits = np.full(256, _limit(space))
    if space == RAW:
        limits[:FIRST_RARE_CLASS], limits[FIRST_RARE_CLASS:] = picture.per_image
    limits[IGNORE_INDEX] = 0
    return limits


def _draw_from(grid: Tensor, label: np.ndarray, limits: np.ndarray, space: str, number: int) -> Points:
    """Draw up to the limit of pixels per class from one image."""
    cells = downsample_labels(torch.from_numpy(label)[None], *grid.shape[-2:])[0].numpy().ravel()
    random = numpy_generator(SEED, "tsne", space, number)
    order = random.permutation(len(cells))
    rank = _rank_within_class(cells[order])
    chosen = order[rank < limits[cells[order]]]
    features = grid.flatten(1)[:, torch.from_numpy(chosen)].T.numpy()
    return Points(features, cells[chosen].astype(np.int64), np.full(len(chosen), number))


def _first_of_each_class(points: Points, number: int) -> Points:
    """Keep the first `number` points of each class, in order of the images."""
    kept = _rank_within_class(points.classes) < number
    return Points(points.features[kept], points.classes[kept], points.images[kept])


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
    """Return how well classes are separated, each class counting the same; features have length 1.

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


def embed(points: Points, iterations: int) -> np.ndarray:
    """Return the t-SNE coordinates (N, 2)."""
    seed = derive_seed(SEED, "tsne", "embedding") % 2**32
    features = points.features
    if min(features.shape) > COMPONENTS:  # the authors' library does so, too
        features = PCA(COMPONENTS, svd_solver="full").fit_transform(features)
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, max_iter=iterations, random_state=seed)
    return tsne.fit_transform(features)


def _draw(
    sampled: Mapping[str, Mapping[str, Points]],
    planes: Mapping[tuple[str, str], np.ndarray],
    measured: Mapping[str, Mapping[str, Mapping[str, float]]],
    classes: tuple[str, ...],
    colors: np.ndarray,
    folder: Path,
    stamp: str,
) -> None:
    runs = list(sampled)
    shown = [int(i) for i in np.unique(sampled[runs[0]][RAW].classes)]
    legend = {"handles": point_legend(classes, colors, shown), "loc": "center left", "handletextpad": 0.1}
    figure, axes = plt.subplots(2, 1, figsize=(COLUMN, 5.9))
    for axis, run in zip(axes, runs, strict=True):
        points = sampled[run][RAW]
        _scatter(axis, points, planes[run, RAW], colors, 9 if len(points.classes) < 2000 else 2)
        axis.set_title(run, loc="left")
    figure.subplots_adjust(left=0.01, right=0.77, top=0.96, bottom=0.03, hspace=0.1)
    figure.legend(**legend, bbox_to_anchor=(0.77, 0.5), labelspacing=0.75)
    save(figure, folder, "fig1", stamp)
    plt.close(figure)

    spaces = [space for space in sampled[runs[0]] if space != RAW]
    figure, grid = plt.subplots(2, len(spaces), figsize=(COLUMN * 1.8, 4.6), squeeze=False)
    for row, run in zip(grid, runs, strict=True):
        row[0].set_ylabel(run)
        for axis, space in zip(row, spaces, strict=True):
            _scatter(axis, sampled[run][space], planes[run, space], colors, 4)
            axis.set_title(f"{space}\n{_numbers(measured[run][space])}", fontsize=5.5)
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


def _numbers(values: Mapping[str, float]) -> str:
    knn, silhouette, ratio = (values[key] for key in ("knn_accuracy", "silhouette", "distance_ratio"))
    return f"{NEIGHBOURS}-NN {knn:.1f} %, silh. {silhouette:+.2f}, ratio {ratio:.2f}"
