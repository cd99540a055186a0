"""Fig. 1: the feature space of one network trained without and with the contrastive loss, drawn and measured.

The picture follows the authors' code: the backbone's map at stride 4 as it is, neither projected nor
normalised, with the label of each cell. The validation images are gone through in order; each gives a few
random pixels of every class, until a class has enough. 50 principal components, then t-SNE with perplexity
30. Which stride the paper shows is not said; 4 is the default of the authors' class. Unlike theirs, t-SNE
starts from the principal components and is the Barnes-Hut approximation.

Not in the paper: the numbers. Features are the maps that the loss acts on, before projection, each pixel's
vector normalised to length 1. A scale is looked at on its own grid, with the label that the loss gives each
cell. "All scales" normalises each scale, resizes it bilinearly to the finest grid, concatenates and
normalises again. Pixels are drawn at random from all images, as many of each class, unless a class has
fewer; one with hardly any is left out. The numbers are measured in feature space, never in the t-SNE plane,
and every class counts the same.

Both networks are shown and measured on the same pixels.
"""

import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from mscs.datasets import Dataset, Sample
from mscs.errors import MscsError
from mscs.losses.sampling import downsample_labels
from mscs.results import write_json
from mscs.seeding import derive_seed, numpy_generator
from mscs.transforms import IGNORE_INDEX
from reproduce.style import COLUMN, STYLE, save
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
COMPONENTS = 50
MARKERS = "os^DvPX*"  # a second channel beside colour, as official palettes have near-twins


@dataclass(frozen=True)
class Picture:
    """How much the picture shows: points of a class, those of one image, and iterations of t-SNE.

    per_image: of a frequent class and of a rare one (training id 15 or more: from bus on, on Cityscapes).
    """

    per_class: int
    per_image: tuple[int, int]
    iterations: int


AUTHORS = Picture(per_class=1000, per_image=(2, 10), iterations=2000)
# A dozen small images and a minute: enough to see that the figure is drawn.
MINI = Picture(per_class=50, per_image=(6, 6), iterations=400)
FIRST_RARE_CLASS = 15


@dataclass(frozen=True)
class Points:
    """Sampled pixels: features (N, C), class (N,), number of the image that each is from (N,)."""

    features: np.ndarray
    classes: np.ndarray
    images: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Points":
        """Return some of the points, by index or mask."""
        return Points(self.features[chosen], self.classes[chosen], self.images[chosen])


def write_tsne(baseline: Sequence[TrainedRun], ours: Sequence[TrainedRun], folder: Path, stamp: str) -> None:
    """Write fig1.png, fig1.pdf and fig1.json into `folder`: the picture of the first seed, numbers of all."""
    picture = MINI if baseline[0].settings.data.source == "generated" else AUTHORS
    numbers: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in NETWORKS}
    sampled: list[dict[str, Points]] = []
    for name, seeds in zip(NETWORKS, (baseline, ours), strict=True):
        for run in seeds:
            spaces = sample_pixels(run, picture)
            numbers[name].append(
                {space: separation(points) for space, points in spaces.items() if space != RAW}
            )
            if run is seeds[0]:
                sampled.append(spaces)
    dataset = baseline[0].dataset()
    counts = {
        space: {dataset.classes[i]: int((points.classes == i).sum()) for i in np.unique(points.classes)}
        for space, points in sampled[0].items()
    }
    facts: dict[str, Any] = {name: over_seeds(seeds) for name, seeds in numbers.items()}
    facts["points"] = counts[ALL_SCALES]
    facts["picture"] = {
        "features": RAW,
        "points": counts[RAW],
        "per_class": picture.per_class,
        "iterations": picture.iterations,
        "perplexity": PERPLEXITY,
    }
    write_json(folder / "fig1.json", facts)
    drawn = [spaces[RAW] for spaces in sampled]
    with threadpool_limits(1), ThreadPoolExecutor(2) as pool:  # one thread for each, side by side
        planes = list(pool.map(lambda points: embed(points, picture.iterations), drawn))
    _draw(drawn, planes, dataset, folder, stamp)


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
            pools.setdefault(space, []).append(_draw_from(grid, label, space, number, picture))
    found = {}
    for space, parts in pools.items():
        fields = ("features", "classes", "images")
        points = Points(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))
        if space == RAW:  # the first ones of each class, in order of the images
            found[space] = points[_rank_within_class(points.classes) < picture.per_class]
        else:
            found[space] = balance(points, space)
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
    single = {f"scale {i}, stride {strides[i]}": x for i, x in enumerate(unit)}
    return {ALL_SCALES: F.normalize(torch.cat(resized), dim=0), **single}


def _limit(space: str) -> int:
    return PER_CLASS if space == ALL_SCALES else PER_CLASS_OF_SCALE


def _draw_from(grid: Tensor, label: np.ndarray, space: str, number: int, picture: Picture) -> Points:
    """Draw random pixels from one image: of each class up to the limit of the space."""
    limits = np.full(256, _limit(space))  # by training id
    if space == RAW:
        limits[:FIRST_RARE_CLASS], limits[FIRST_RARE_CLASS:] = picture.per_image
    limits[IGNORE_INDEX] = 0
    cells = downsample_labels(torch.from_numpy(label)[None], *grid.shape[-2:])[0].numpy().ravel()
    order = numpy_generator(SEED, "tsne", space, number).permutation(len(cells))
    chosen = order[_rank_within_class(cells[order]) < limits[cells[order]]]
    features = grid.flatten(1)[:, torch.from_numpy(chosen)].T.numpy()
    return Points(features, cells[chosen].astype(np.int64), np.full(len(chosen), number))


def balance(points: Points, space: str) -> Points:
    """Keep up to the limit of random points per class, no class with fewer than `LEAST_PER_CLASS`."""
    values, sizes = np.unique(points.classes, return_counts=True)
    enough = np.isin(points.classes, values[sizes >= LEAST_PER_CLASS])
    order = numpy_generator(SEED, "tsne", space, "balance").permutation(np.flatnonzero(enough))
    order = order[_rank_within_class(points.classes[order]) < _limit(space)]
    return points[order[np.argsort(points.classes[order], kind="stable")]]


def _rank_within_class(classes: np.ndarray) -> np.ndarray:
    """Return for each entry how many earlier entries have its class."""
    order = np.argsort(classes, kind="stable")
    ordered = classes[order]
    rank = np.empty(len(classes), np.int64)
    rank[order] = np.arange(len(classes)) - np.searchsorted(ordered, ordered)
    return rank


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


def over_seeds(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return mean and, with several seeds, standard deviation (`..._std`) of the numbers of every space."""
    found: dict[str, dict[str, float]] = {}
    for space in seeds[0]:
        for name in seeds[0][space]:
            values = [numbers[space][name] for numbers in seeds if space in numbers]
            found.setdefault(space, {})[name] = round(statistics.fmean(values), 6)
            if len(values) > 1:
                found[space][f"{name}_std"] = round(statistics.stdev(values), 6)
    return found


def embed(points: Points, iterations: int) -> np.ndarray:
    """Return the t-SNE coordinates (N, 2)."""
    seed = derive_seed(SEED, "tsne", "embedding") % 2**32
    features = points.features
    if min(features.shape) > COMPONENTS:  # the authors' library does so, too
        features = PCA(COMPONENTS, svd_solver="full").fit_transform(features)
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, max_iter=iterations, random_state=seed)
    return tsne.fit_transform(features)


@mpl.rc_context(STYLE)
def _draw(drawn: list[Points], planes: list[np.ndarray], dataset: Dataset, folder: Path, stamp: str) -> None:
    """Draw one plane per network, with the markers of the classes beside them."""
    looks = [
        {"color": color / 255, "marker": MARKERS[index % len(MARKERS)]}
        for index, color in enumerate(dataset.colors)
    ]
    figure = Figure(figsize=(COLUMN, 5.9))
    for axis, name, points, plane in zip(figure.subplots(2), NETWORKS, drawn, planes, strict=True):
        size = 9 if len(plane) < 2000 else 2
        for index in np.unique(points.classes):
            chosen = plane[points.classes == index].T
            axis.scatter(*chosen, s=size, linewidths=0.2, edgecolors="white", **looks[index])
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("#bbbbbb")
        axis.set_title(name, loc="left")
    figure.subplots_adjust(left=0.01, right=0.77, top=0.96, bottom=0.03, hspace=0.1)
    handles = [
        Line2D([], [], linestyle="", markersize=3.5, label=dataset.classes[index], **looks[index])
        for index in np.unique(drawn[0].classes)
    ]
    place = {"loc": "center left", "bbox_to_anchor": (0.77, 0.5)}
    figure.legend(handles=handles, **place, handletextpad=0.1, labelspacing=0.75)
    save(figure, folder, "fig1", stamp)
