"""A contact sheet of a dataset: images, labels laid over them, legend and class histogram."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mscs.datasets.base import Dataset
from mscs.datasets.spec import IGNORE_INDEX
from mscs.errors import UsageError
from mscs.results import atomic_path

TILE_WIDTH, LEGEND_WIDTH, ROW, GAP = 480, 300, 18, 8  # pixels
MAX_LEGEND = 64  # beyond that many classes only those that occur are listed
OPACITY = 0.6
INK, PAPER, FAINT, IGNORED = (30, 30, 30), (255, 255, 255), (120, 120, 120), (0, 0, 0)


def contact_sheet(dataset: Dataset, number: int) -> np.ndarray:
    """Draw `number` samples, evenly spaced over the dataset, as one image uint8 (H, W, 3)."""
    if number < 1:
        raise UsageError(f"asked for {number} samples; at least 1 is needed")
    palette = np.full((256, 3), IGNORED, np.uint8)
    palette[: dataset.num_classes] = dataset.colors
    counts = np.zeros(256, np.int64)
    rows = []
    for i in np.unique(np.linspace(0, len(dataset) - 1, min(number, len(dataset))).astype(int)):
        sample = dataset[int(i)]
        counts += np.bincount(sample.label.ravel(), minlength=256)
        rows.append(_sample_row(sample.image, palette[sample.label], sample.id))
    legend = _legend(dataset, counts, sum(row.height for row in rows))
    height = max(legend.height, sum(row.height for row in rows))
    sheet = Image.new("RGB", (rows[0].width + legend.width, height), PAPER)
    sheet.paste(legend, (rows[0].width, 0))
    for place, row in enumerate(rows):
        sheet.paste(row, (0, sum(above.height for above in rows[:place])))
    return np.asarray(sheet)


def write_contact_sheet(dataset: Dataset, number: int, path: Path) -> None:
    """Write a contact sheet as a PNG file."""
    sheet = contact_sheet(dataset, number)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")


def _sample_row(pixels: np.ndarray, painted: np.ndarray, name: str) -> Image.Image:
    """Return image and overlay side by side, with the sample's id above."""
    size = (TILE_WIDTH, round(pixels.shape[0] * TILE_WIDTH / pixels.shape[1]))
    image = Image.fromarray(pixels).resize(size)
    overlay = Image.blend(image, Image.fromarray(painted).resize(size, Image.Resampling.NEAREST), OPACITY)
    row = Image.new("RGB", (2 * TILE_WIDTH + 3 * GAP, size[1] + ROW + 2 * GAP), PAPER)
    row.paste(image, (GAP, ROW + GAP))
    row.paste(overlay, (TILE_WIDTH + 2 * GAP, ROW + GAP))
    ImageDraw.Draw(row).text((GAP, GAP), name, INK, ImageFont.load_default(13))
    return row


def _legend(dataset: Dataset, counts: np.ndarray, height: int) -> Image.Image:
    """Return the classes with colours and their share of the pixels shown, in as many columns as needed."""
    ids = [*range(dataset.num_classes), IGNORE_INDEX]
    shares = counts[ids] / counts.sum()
    names, colors = (*dataset.classes, "ignored"), [*map(tuple, dataset.colors.tolist()), IGNORED]
    rows = [row for row in range(len(ids)) if len(ids) <= MAX_LEGEND or shares[row]]
    which = "share of the pixels shown" if len(rows) == len(ids) else "the classes in these samples"
    per_column = max(12, height // ROW - 3)
    columns = -(-len(rows) // per_column)
    canvas = Image.new("RGB", (columns * LEGEND_WIDTH, (min(per_column, len(rows)) + 3) * ROW), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    draw.text((GAP, 0), f"{dataset.name} {dataset.split}: {len(dataset)} images", INK, font)
    draw.text((GAP, ROW), which, INK, font)
    for place, row in enumerate(rows):
        x, y = place // per_column * LEGEND_WIDTH + GAP, (place % per_column + 2) * ROW + GAP
        share = shares[row]
        draw.rectangle((x, y + 2, x + 14, y + 14), fill=colors[row], outline=FAINT)
        draw.text((x + 20, y), names[row][:22], INK if share else FAINT, font)
        if share:
            draw.rectangle((x + 160, y + 4, x + 161 + 80 * share / shares.max(), y + 12), fill=colors[row])
            draw.text((x + 246, y), f"{100 * share:.1f}%", INK, font)
    return canvas
