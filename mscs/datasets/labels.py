"""Label tables of the four datasets: classes, raw label values, colours, splits. Standard library only.

The numbers are in labels.json: class lists and raw values as the paper's experiments use them, the official
Cityscapes colours, and the 19 Cityscapes class weights of the HRNet code base. The other datasets are drawn
with the colour rule of Pascal VOC (see `voc_palette`).
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mscs.errors import UsageError, unknown_name

IGNORE_INDEX = 255
DATASETS = ("cityscapes", "ade20k", "pascal_context", "cadis")
DEFAULT_CADIS_TASK = 3
GENERATED = "generated.json"  # marks the root folder of a generated dataset and records how it was made

Color = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class LabelSet:
    """What the labels of one dataset (and, for CaDIS, one task) mean."""

    dataset: str
    task: int | None
    classes: tuple[str, ...]
    """Class names; the position is the training id."""
    raw_ids: tuple[tuple[int, ...], ...]
    """Per class, the values that stand for it in the label files."""
    ignored_raw_ids: tuple[int, ...]
    """Values that occur in the label files and belong to no class."""
    colors: tuple[Color, ...]
    class_weights: tuple[float, ...] | None
    """Weights of the cross-entropy per class, where the paper's experiments use them."""
    split_counts: dict[str, int]
    """Number of images that the official dataset has in each split."""

    @property
    def num_classes(self) -> int:
        """Number of classes that are trained and scored."""
        return len(self.classes)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.split_counts)

    def lookup(self) -> bytes:
        """Return 256 bytes that map a raw label value to its training id, everything else to 255."""
        table = bytearray([IGNORE_INDEX] * 256)
        for train_id, raw in enumerate(self.raw_ids):
            for value in raw:
                table[value] = train_id
        return bytes(table)

    def known_raw_values(self) -> frozenset[int]:
        """Return every value that a correct label file may hold (-1 is stored as 255)."""
        values = [value for raw in self.raw_ids for value in raw]
        return frozenset(value % 256 for value in (*values, *self.ignored_raw_ids))


@functools.cache
def _facts() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("labels.json").read_text())


def voc_palette(num_colors: int) -> tuple[Color, ...]:
    """Return colours 1..num_colors of the Pascal VOC rule: bit i of each byte comes from bit 3i+channel."""

    def color(index: int) -> Color:
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        return rgb[0], rgb[1], rgb[2]

    return tuple(color(index) for index in range(1, num_colors + 1))


def check_dataset(name: str) -> None:
    """Raise UsageError unless `name` is one of the four datasets."""
    if name not in DATASETS:
        raise UsageError(unknown_name("dataset", name, DATASETS))


def label_set(name: str, task: int | None = None) -> LabelSet:
    """Return the label table of a dataset.

    Args:
        name: one of `DATASETS`.
        task: CaDIS only: 1 (8 classes), 2 (17) or 3 (25); None means 3.

    Raises:
        UsageError: unknown dataset or task.
    """
    check_dataset(name)
    facts = _facts()[name]
    table = facts
    if name == "cadis":
        task = DEFAULT_CADIS_TASK if task is None else task
        if str(task) not in facts["tasks"]:
            raise UsageError(f"cadis has no task {task!r}. Accepted: 1 (8 classes), 2 (17), 3 (25)")
        table = facts["tasks"][str(task)]
    elif task is not None:
        raise UsageError(f"{name} has no tasks, found task={task!r}. Accepted: None")
    classes = tuple(table["classes"])
    colors = tuple((r, g, b) for r, g, b in table.get("colors", voc_palette(len(classes))))
    weights = facts.get("class_weights")
    return LabelSet(
        dataset=name,
        task=task,
        classes=classes,
        raw_ids=tuple(tuple(raw) for raw in table["raw_ids"]),
        ignored_raw_ids=tuple(table["ignored_raw_ids"]),
        colors=colors,
        class_weights=tuple(weights) if weights else None,
        split_counts=dict(facts["split_counts"]),
    )


def cadis_videos(split: str) -> tuple[int, ...]:
    """Return the numbers of the CaDIS videos of a split."""
    return tuple(_facts()["cadis"]["videos"][split])


def cadis_blacklist() -> frozenset[str]:
    """Return the ids of the CaDIS frames that the paper's authors list as wrongly annotated."""
    return frozenset(_facts()["cadis"]["blacklisted_frames"])


def cadis_raw_classes() -> tuple[str, ...]:
    """Return the 36 CaDIS classes by raw label value."""
    return tuple(_facts()["cadis"]["raw_classes"])
