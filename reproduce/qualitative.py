"""Figs. 2 to 4: image, ground truth, CE and ours side by side, with rows and boxes chosen by rule.

Rows: validation images ranked by gain, our per-image mIoU minus the baseline's (mean over the classes of the
image's ground truth); equally many from the top, the middle and the bottom. Boxes: connected regions
(8 neighbours) where exactly one of the two networks is right; per row the largest ones, at most `BOXES` for
each side and none below `LEAST_AREA` of the image: solid white where ours is right, dashed orange where the
baseline is.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from mscs.datasets import Dataset
from mscs.metrics import confusion_matrix, scores
from reproduce.style import COLUMN, STYLE, save
from reproduce.trained import TrainedRun

COLUMNS = ("image", "ground truth", "CE", "CE + ours")
RANKS = ("best", "median", "worst")
ROWS_PER_RANK = 2
BOXES = 3
LEAST_AREA = 5e-4
SIDES: dict[str, dict[str, Any]] = {
    "ours": {"color": "white", "linestyle": "-"},
    "baseline": {"color": "#ff9f1c", "linestyle": (0, (3, 1.5))},
}
LEGEND_ENTRIES = 19
SHOWN_WIDTH = 768
"""Pixels across a panel at most; more would only make the PDF heavy."""


@dataclass(frozen=True)
class Box:
    """A connected region that one network gets right and the other wrong: corner, size and pixels in it."""

    x: int
    y: int
    width: int
    height: int
    pixels: int


@dataclass(frozen=True)
class Row:
    """One validation image in a figure: its numbers, as the figure's record has them, and what is drawn.

    panels: image, label, baseline's and our prediction; all but the image are training ids (H, W).
    """

    facts: dict[str, Any]
    panels: tuple[np.ndarray, ...]
    boxes: dict[str, list[Box]]


def write_comparisons(
    figure: str, baseline: TrainedRun, ours: TrainedRun, folder: Path, stamp: str
) -> dict[str, Any]:
    """Write {figure}.png and .pdf into `folder`; return the gains and, per row, image, scores and boxes."""
    dataset = baseline.dataset()
    runs = {"baseline": baseline, "ours": ours}
    scores = [
        {side: image_miou(run.predict(sample), run.label(sample)) for side, run in runs.items()}
        for sample in (dataset[i] for i in range(len(dataset)))
    ]
    gains = np.array([found["ours"] - found["baseline"] for found in scores])
    rows = []
    for i, rank in choose_rows(gains):
        sample = dataset[i]
        label, theirs, mine = baseline.label(sample), baseline.predict(sample), ours.predict(sample)
        boxes = {"ours": find_boxes(label, mine, theirs), "baseline": find_boxes(label, theirs, mine)}
        facts = {"id": sample.id, "rank": rank, **scores[i], "gain": float(gains[i])}
        facts["boxes"] = {side: [asdict(box) for box in found] for side, found in boxes.items()}
        rows.append(Row(facts, (baseline.image(sample), label, theirs, mine), boxes))
    _draw(rows, dataset, folder, figure, stamp)
    return {
        "runs": {side: run.title for side, run in runs.items()},
        "images": len(gains),
        "mean_gain": float(gains.mean()),
        "ours_better": int((gains > 0).sum()),
        "baseline_better": int((gains < 0).sum()),
        "rows": [row.facts for row in rows],
    }


def image_miou(prediction: np.ndarray, label: np.ndarray) -> float:
    """Return the mIoU in percent over the classes of `label` (255 = ignored); 0 where nothing is labelled."""
    counts = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(label), 256)
    iou = np.array(scores(counts)["class_iou"], dtype=float)[counts.sum(1) > 0]
    return float(iou.mean()) if iou.size else 0.0


def choose_rows(gains: np.ndarray) -> list[tuple[int, str]]:
    """Return (index, rank) of the images with the best, the middle and the worst gains, in equal shares.

    Fewer than three images per share make the shares smaller; below three images all are shown.
    """
    order = [int(i) for i in np.argsort(-gains, kind="stable")]
    share = min(ROWS_PER_RANK, len(order) // 3)
    if share == 0:
        return list(zip(order, RANKS, strict=False))
    middle = (len(order) - share) // 2
    parts = (order[:share], order[middle : middle + share], order[-share:])
    return [(i, rank) for rank, part in zip(RANKS, parts, strict=True) for i in part]


def find_boxes(label: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> list[Box]:
    """Return the `BOXES` largest connected regions where `right` equals the label and `wrong` does not."""
    mask = (label != 255) & (right == label) & (wrong != label)
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    boxes = [Box(*(int(value) for value in row)) for row in stats[1:]]
    boxes = [box for box in boxes if box.pixels >= LEAST_AREA * mask.size]
    return sorted(boxes, key=lambda box: (-box.pixels, box.y, box.x))[:BOXES]


@mpl.rc_context(STYLE)
def _draw(rows: list[Row], dataset: Dataset, folder: Path, name: str, stamp: str) -> None:
    margin, foot, head = 0.25, 0.86, 0.2
    shapes = [row.panels[0].shape for row in rows]
    heights = [(COLUMN - margin) / 4 * shape[0] / shape[1] + 0.04 for shape in shapes]
    height = sum(heights) + head + foot
    figure = Figure(figsize=(COLUMN, height))
    grid = {"height_ratios": heights, "hspace": 0.03, "wspace": 0.03}
    axes = figure.subplots(len(rows), 4, squeeze=False, gridspec_kw=grid)
    figure.subplots_adjust(left=margin / COLUMN, right=0.995, top=1 - head / height, bottom=foot / height)
    colors = np.zeros((256, 3), np.uint8)
    colors[: dataset.num_classes] = dataset.colors
    for line, row in zip(axes, rows, strict=True):
        image, *maps = row.panels
        for axis, panel in zip(line, (image, *(colors[ids] for ids in maps)), strict=True):
            _show(axis, panel, row.boxes)
        line[0].set_ylabel(f"{row.facts['rank']}\n{row.facts['gain']:+.1f}", fontsize=5.5, labelpad=2)
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, pad=2.5)
    _legends(figure, rows, dataset, height)
    save(figure, folder, name, stamp)


def _show(axis: Axes, panel: np.ndarray, boxes: dict[str, list[Box]]) -> None:
    height, width = panel.shape[:2]
    step = -(-width // SHOWN_WIDTH)
    axis.imshow(panel[::step, ::step], extent=(0, width, height, 0), interpolation="none")
    for side, found in boxes.items():
        for box in found:
            left, top = max(box.x - 1, 0), max(box.y - 1, 0)
            right, bottom = min(box.x + box.width + 1, width), min(box.y + box.height + 1, height)
            edge = Rectangle((left, top), right - left, bottom - top, fill=False, lw=0.7, **SIDES[side])
            edge.set_path_effects([patheffects.withStroke(linewidth=1.5, foreground="black")])
            axis.add_patch(edge)
    axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axis.spines[:].set_visible(False)


def _legends(figure: Figure, rows: list[Row], dataset: Dataset, height: float) -> None:
    """Add the meaning of boxes, and the colours of the classes that cover most of the shown pixels."""
    shown_ids = np.concatenate([ids.ravel() for row in rows for ids in row.panels[1:]])
    area = np.bincount(shown_ids, minlength=256)[: dataset.num_classes]
    largest = np.argsort(-area, kind="stable")[:LEGEND_ENTRIES]
    shown = sorted(int(i) for i in largest if area[i] > 0)
    hidden = int((area > 0).sum()) - len(shown)
    classes: list[Artist] = [Patch(color=dataset.colors[i] / 255, label=dataset.classes[i]) for i in shown]
    classes.append(Patch(color="black", label="not labelled"))
    if hidden:
        classes.append(Line2D([], [], linestyle="", label=f"and {hidden} more classes"))
    halo = [patheffects.withStroke(linewidth=2.2, foreground="black")]
    boxes = [
        Line2D([], [], lw=1.0, path_effects=halo, label=f"only {side} right", **look)
        for side, look in SIDES.items()
    ]
    style = {"loc": "upper center", "handleheight": 0.8, "handletextpad": 0.4}
    place = {"bbox_to_anchor": (0.5, 0.84 / height), "ncols": 2}
    figure.legend(handles=boxes, handlelength=2.5, **style, **place)
    place = {"bbox_to_anchor": (0.5, 0.71 / height), "ncols": 5}
    spacing = {"columnspacing": 0.9, "labelspacing": 0.25}
    figure.legend(handles=classes, handlelength=1.0, fontsize=5, **style, **spacing, **place)
