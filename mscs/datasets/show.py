"""A contact sheet of a dataset: images, labels laid over them, the classes and their share of the pixels."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mscs.datasets.base import Dataset
from mscs.errors import UsageError
from mscs.results import atomic_path

TILE_WIDTH, LEGEND_WIDTH, ROW, GAP = 480, 260, 18, 8  # pixels
OPACITY = 0.6
INK, PAPER, IGNORED = (30, 30, 30), (255, 255, 255), (0, 0, 0)


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
        size = (TILE_WIDTH, round(sample.image.shape[0] * TILE_WIDTH / sample.image.shape[1]))
        image = Image.fromarray(sample.image).resize(size)
        painted = Image.fromarray(palette[sample.label]).resize(size, Image.Resampling.NEAREST)
        rows.append((sample.id, image, Image.blend(image, painted, OPACITY)))
    present = np.flatnonzero(counts)
    height = max(sum(ROW + image.height for _, image, _ in rows), ROW * len(present))
    sheet = Image.new("RGB", (2 * TILE_WIDTH + LEGEND_WIDTH, height), PAPER)
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(12), 0
    for name, image, overlay in rows:
        draw.text((GAP, top), name, INK, font)
        sheet.paste(image, (0, top + ROW))
        sheet.paste(overlay, (TILE_WIDTH, top + ROW))
        top += ROW + image.height
    for place, value in enumerate(present):
        x, y = 2 * TILE_WIDTH + GAP, place * ROW
        name = dataset.classes[value] if value < dataset.num_classes else "ignored"
        draw.rectangle((x, y + 2, x + 14, y + 14), fill=tuple(palette[value].tolist()), outline=INK)
        draw.text((x + 20, y), f"{100 * counts[value] / counts.sum():4.1f}%  {name}", INK, font)
    return np.asarray(sheet)


def write_contact_sheet(dataset: Dataset, number: int, path: Path) -> None:
    """Write a contact sheet as a PNG file."""
    sheet = contact_sheet(dataset, number)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
