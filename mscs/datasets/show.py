"""A contact sheet of a dataset: images, labels laid over them, legend and class histogram."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mscs.datasets.base import Dataset
from mscs.datasets.spec import IGNORE_INDEX
from mscs.errors import UsageError
from mscs.results import atomic_path

TILE_WIDTH = 480
LEGEND_WIDTH = 300
LEGEND_ROW = 18
GAP = 8
MAX_LEGEND = 64  # beyond that many classes only those that occur are listed
OPACITY = 0.6
INK, PAPER, FAINT = (30, 30, 30), (255, 255, 255), (120, 120, 120)


def paint_label(label: np.ndarray, colors: np.ndarray, ignored: Sequence[int] = (0, 0, 0)) -> np.ndarray:
    """Return the colours uint8 (H, W, 3) of a label uint8 (H, W) of training ids."""
    table = np.empty((256, 3), np.uint8)
    table[:] = ignored
    table[: len(colors)] = colors
    return table[label]


def contact_sheet(dataset: Dataset, number: int) -> np.ndarray:
    """Draw `number` samples, evenly spaced over the dataset, as one image uint8 (H, W, 3)."""
    if number < 1:
        raise UsageError(f"asked for {number} samples; at least 1 is needed")
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(number, len(dataset))).astype(int))
    counts = np.zeros(256, np.int64)
    rows = []
    for i in chosen:
        sample = dataset[int(i)]
        counts += np.bincount(sample.label.ravel(), minlength=256)
        rows.append(_sample_row(sample.image, sample.label, sample.id, dataset.colors))
    samples = np.concatenate(rows)
    legend = _legend(dataset, counts, samples.shape[0])
    height = max(samples.shape[0], legend.shape[0])
    sheet = np.full((height, samples.shape[1] + legend.shape[1], 3), 255, np.uint8)
    sheet[: samples.shape[0], : samples.shape[1]] = samples
    sheet[: legend.shape[0], samples.shape[1] :] = legend
    return sheet


def write_contact_sheet(dataset: Dataset, number: int, path: Path) -> None:
    """Write a contact sheet as a PNG file."""
    sheet = contact_sheet(dataset, number)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")


def _sample_row(image: np.ndarray, label: np.ndarray, name: str, colors: np.ndarray) -> np.ndarray:
    """Return image and overlay side by side, with the sample's id above."""
    height = round(image.shape[0] * TILE_WIDTH / image.shape[1])
    area = cv2.INTER_AREA if image.shape[1] > TILE_WIDTH else cv2.INTER_LINEAR
    image = cv2.resize(image, (TILE_WIDTH, height), interpolation=area)
    label = cv2.resize(label, (TILE_WIDTH, height), interpolation=cv2.INTER_NEAREST)
    painted = cv2.addWeighted(paint_label(label, colors), OPACITY, image, 1 - OPACITY, 0)
    row = np.full((height + LEGEND_ROW + 2 * GAP, 2 * TILE_WIDTH + 3 * GAP, 3), 255, np.uint8)
    top = LEGEND_ROW + GAP
    row[top : top + height, GAP : GAP + TILE_WIDTH] = image
    row[top : top + height, 2 * GAP + TILE_WIDTH : 2 * (GAP + TILE_WIDTH)] = painted
    canvas = Image.fromarray(row)
    ImageDraw.Draw(canvas).text((GAP, GAP), name, INK, ImageFont.load_default(13))
    return np.asarray(canvas)


def _legend(dataset: Dataset, counts: np.ndarray, height: int) -> np.ndarray:
    """Return the classes with colours and their share of the pixels shown, in as many columns as needed."""
    names = (*dataset.classes, "ignored")
    colors = [*map(tuple, dataset.colors.tolist()), (0, 0, 0)]
    shares = counts[[*range(dataset.num_classes), IGNORE_INDEX]] / counts.sum()
    rows = list(range(len(names)))
    title = f"{dataset.name} {dataset.split}: {len(dataset)} images; share of the pixels shown"
    if len(rows) > MAX_LEGEND:
        rows = [row for row in rows if shares[row]]
        title = (
            f"{dataset.name} {dataset.split}: {len(dataset)} images; the {len(rows)} classes in these samples"
        )
    top = 2 * LEGEND_ROW
    per_column = max(12, (height - top - GAP) // LEGEND_ROW)
    columns = -(-len(rows) // per_column)
    size = (columns * LEGEND_WIDTH, top + min(per_column, len(rows)) * LEGEND_ROW + GAP)
    canvas = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    draw.text((GAP, GAP), title, INK, ImageFont.load_default(11))
    for place, row in enumerate(rows):
        x, y = place // per_column * LEGEND_WIDTH + GAP, top + place % per_column * LEGEND_ROW
        color, share = colors[row], shares[row]
        draw.rectangle((x, y + 2, x + 14, y + 14), fill=color, outline=FAINT)
        draw.text((x + 20, y), names[row][:22], INK if share else FAINT, font)
        if share:
            draw.rectangle((x + 160, y + 4, x + 161 + 80 * share / shares.max(), y + 12), fill=color)
            draw.text((x + 246, y), f"{100 * share:.1f}%", INK, font)
    return np.asarray(canvas)
