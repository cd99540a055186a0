"""Figs. 2 to 4: image, ground truth, CE and ours side by side, with rows and boxes chosen by rule.

Rows: validation images ranked by gain, our per-image mIoU minus the baseline's (mean over the classes of the
image's ground truth); equally many from the top, the middle and the bottom. Boxes: connected regions
(8 neighbours) where exactly one of the two networks is right; per row the largest ones, at most `BOXES` for
each side and none below `LEAST_AREA` of the image: solid white where ours is right, dashed orange where the
baseline is.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from mscs.datasets import Dataset
from mscs.metrics import confusion_matrix, scores
from reproduce.style import COLUMN, paper_style, save
from reproduce.trained import TrainedRun

COLUMNS = ("image", "ground truth", "CE", "CE + ours")
RANKS = ("best", "median", "worst")
ROWS_PER_RANK = 2
BOXES = 3
LEAST_AREA = 5e-4
SIDES = {"ours": ("white", "-"), "baseline": ("#ff9f1c", (0, (3, 1.5)))}
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
    """One validation image in a figure: where it stands in the ranking, and its arrays, all (H, W)."""

    id: str
    rank: str
    baseline_miou: float
    ours_miou: float
    image: np.ndarray
    label: np.ndarray
    baseline: np.ndarray
    ours: np.ndarray
    boxes: dict[str, list[Box]]

    @property
    def gain(self) -> float:
        """Our mIoU minus the baseline's on this image, in points."""
        return self.ours_miou - self.baseline_miou

    def record(self) -> dict[str, Any]:
        """Return the row's numbers as JSON values."""
        boxes = {side: [asdict(box) for box in found] for side, found in self.boxes.items()}
        scores = {"baseline": self.baseline_miou, "ours": self.ours_miou, "gain": self.gain}
        return {"id": self.id, "rank": self.rank, **scores, "boxes": boxes}


def write_comparisons(
    figure: str, baseline: TrainedRun, ours: TrainedRun, folder: Path, stamp: str
) -> dict[str, Any]:
    """Write {figure}.png and .pdf into `folder`; return the gains and, per row, image, scores and boxes."""
    dataset = baseline.dataset()
    found = np.array([_scores(baseline, ours, dataset, i) for i in range(len(dataset))])
    gains = found[:, 1] - found[:, 0]
    rows = [_row(baseline, ours, dataset, i, rank, found[i]) for i, rank in choose_rows(gains)]
    with paper_style():
        _draw(rows, dataset, folder, figure, stamp)
    return {
        "runs": {"baseline": baseline.title, "ours": ours.title},
        "images": len(gains),
        "mean_gain": float(gains.mean()),
        "ours_better": int((gains > 0).sum()),
        "baseline_better": int((gains < 0).sum()),
        "rows": [row.record() for row in rows],
    }


def _scores(baseline: TrainedRun, ours: TrainedRun, dataset: Dataset, index: int) -> tuple[float, float]:
    sample = dataset[index]
    label = baseline.label(sample)
    return image_miou(baseline.predict(sample), label), image_miou(ours.predict(sample), label)


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


def _row(
    baseline: TrainedRun, ours: TrainedRun, dataset: Dataset, index: int, rank: str, miou: Sequence[float]
) -> Row:
    sample = dataset[index]
    label, theirs, mine = baseline.label(sample), baseline.predict(sample), ours.predict(sample)
    boxes = {"ours": find_boxes(label, mine, theirs), "baseline": find_boxes(label, theirs, mine)}
    image = baseline.image(sample)
    return Row(sample.id, rank, float(miou[0]), float(miou[1]), image, label, theirs, mine, boxes)


def find_boxes(label: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> list[Box]:
    """Return the `BOXES` largest connected regions where `right` equals the label and `wrong` does not."""
    mask = (label != 255) & (right == label) & (wrong != label)
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    boxes = [Box(*(int(value) for value in row)) for row in stats[1:]]
    boxes = [box for box in boxes if box.pixels >= LEAST_AREA * mask.size]
    return sorted(boxes, key=lambda box: (-box.pixels, box.y, box.x))[:BOXES]


def _draw(rows: list[Row], dataset: Dataset, folder: Path, name: str, stamp: str) -> None:
    margin, foot, head = 0.25, 0.86, 0.2
    width = (COLUMN - margin) / 4
    heights = [width * row.label.shape[0] / row.label.shape[1] + 0.04 for row in rows]
    height = sum(heights) + head + foot
    figure, axes = plt.subplots(
        len(rows),
        4,
        figsize=(COLUMN, height),
        squeeze=False,
        gridspec_kw={"height_ratios": heights, "hspace": 0.03, "wspace": 0.03},
    )
    figure.subplots_adjust(left=margin / COLUMN, right=0.995, top=1 - head / height, bottom=foot / height)
    colors = np.zeros((256, 3), np.uint8)
    colors[: dataset.num_classes] = dataset.colors
    for line, row in zip(axes, rows, strict=True):
        panels = (row.image, colors[row.label], colors[row.baseline], colors[row.ours])
        for axis, panel in zip(line, panels, strict=True):
            _show(axis, panel, row.boxes)
        line[0].set_ylabel(f"{row.rank}\n{row.gain:+.1f}", fontsize=5.5, labelpad=2)
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, pad=2.5)
    _legends(figure, rows, dataset, height)
    save(figure, folder, name, stamp)
    plt.close(figure)


def _show(axis: Axes, panel: np.ndarray, boxes: dict[str, list[Box]]) -> None:
    height, width = panel.shape[:2]
    step = -(-width // SHOWN_WIDTH)
    axis.imshow(panel[::step, ::step], extent=(0, width, height, 0), interpolation="none")
    halo = patheffects.withStroke(linewidth=1.5, foreground="black")
    for side, found in boxes.items():
        color, dash = SIDES[side]
        for box in found:
            left, top = max(box.x - 1, 0), max(box.y - 1, 0)
            right, bottom = min(box.x + box.width + 1, width), min(box.y + box.height + 1, height)
            edge = Rectangle(
                (left, top),
                right - left,
                bottom - top,
                fill=False,
                color=color,
                linestyle=dash,
                linewidth=0.7,
            )
            edge.set_path_effects([halo])
            axis.add_patch(edge)
    axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    for spine in axis.spines.values():
        spine.set_visible(False)


def _legends(figure: plt.Figure, rows: list[Row], dataset: Dataset, height: float) -> None:
    """Add the meaning of boxes, and the colours of the classes that cover most of the shown pixels."""
    areas = sum(
        np.bincount(x.ravel(), minlength=256) for row in rows for x in (row.label, row.baseline, row.ours)
    )
    area = np.asarray(areas)[: dataset.num_classes]
    largest = np.argsort(-area, kind="stable")[:LEGEND_ENTRIES]
    shown = sorted(int(i) for i in largest if area[i] > 0)
    hidden = int((area > 0).sum()) - len(shown)
    handles: list[Artist] = [Patch(color=dataset.colors[i] / 255, label=dataset.classes[i]) for i in shown]
    handles.append(Patch(color="black", label="not labelled"))
    if hidden:
        handles.append(Line2D([], [], linestyle="", label=f"and {hidden} more classes"))
    style = {"loc": "upper center", "handlelength": 1.0, "handleheight": 0.8, "handletextpad": 0.4}
    halo = [patheffects.withStroke(linewidth=2.2, foreground="black")]
    lines = [
        Line2D(
            [], [], color=color, linestyle=dash, linewidth=1.0, path_effects=halo, label=f"only {side} right"
        )
        for side, (color, dash) in SIDES.items()
    ]
    figure.legend(
        handles=lines, **(style | {"handlelength": 2.5}), ncols=2, bbox_to_anchor=(0.5, 0.84 / height)
    )
    figure.legend(
        handles=handles,
        **style,
        ncols=5,
        fontsize=5,
        columnspacing=0.9,
        labelspacing=0.25,
        bbox_to_anchor=(0.5, 0.71 / height),
    )
