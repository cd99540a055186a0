"""What a dataset is: label tables, files on disk, where it comes from. Standard library only.

Every dataset states its facts in a `Spec` in a file of its own; `mscs.datasets.registry` lists them.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mscs.errors import MscsError, UsageError, unknown_name
from mscs.results import file_sha256, inside

IGNORE_INDEX = 255
GENERATED = "generated.json"  # marks the root folder of a generated dataset and records how it was made

Color = tuple[int, int, int]


def voc_palette(num_colors: int) -> tuple[Color, ...]:
    """Return colours 1..num_colors of the Pascal VOC rule: bit i of each byte comes from bit 3i+channel."""

    def byte(index: int, channel: int) -> int:
        return sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8))

    return tuple((byte(i, 0), byte(i, 1), byte(i, 2)) for i in range(1, num_colors + 1))


@dataclass(frozen=True, kw_only=True)
class LabelSet:
    """What the labels of one dataset (and, for CaDIS, one task) mean."""

    dataset: str
    task: int | None = None
    classes: tuple[str, ...]
    """Class names; the position is the training id."""
    raw_ids: tuple[tuple[int, ...], ...]
    """Per class, the values that stand for it in the label files."""
    ignored_raw_ids: tuple[int, ...]
    """Values that occur in the label files and belong to no class."""
    colors: tuple[Color, ...]
    class_weights: tuple[float, ...] | None = None
    """Weights of the cross-entropy per class, where the paper's experiments use them."""

    @property
    def num_classes(self) -> int:
        """Number of classes that are trained and scored."""
        return len(self.classes)

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


def numbered_labels(dataset: str, names: str) -> LabelSet:
    """Return the labels of a dataset whose files hold 0 = ignored, 1, 2, ... = the classes in `names`."""
    classes = split_names(names)
    return LabelSet(
        dataset=dataset,
        classes=classes,
        raw_ids=tuple((value,) for value in range(1, len(classes) + 1)),
        ignored_raw_ids=(0,),
        colors=voc_palette(len(classes)),
    )


def split_names(text: str) -> tuple[str, ...]:
    """Return the names in a text of names with commas between them, over any number of lines."""
    return tuple(" ".join(name.split()) for name in text.split(","))


class Entry(NamedTuple):
    """Where one sample lies, relative to the dataset's root folder."""

    id: str
    image: str
    label: str


class Index(NamedTuple):
    """The samples of one split, and what the values in its label files mean."""

    entries: list[Entry]
    labels: LabelSet


@dataclass(frozen=True)
class Part:
    """Files or folders that a dataset's root folder must hold, and where they come from."""

    pattern: str
    """Glob for their names in the root folder."""
    files: Mapping[str, int]
    """Globs below the root folder: how many files a complete part has at least."""
    url: str = ""
    """Archive that contains the part, or the file itself; empty where a download needs an account."""
    checksum: str | None = None
    """As published, "sha1:..."; None where nobody publishes one."""
    max_bytes: int = 20 << 30
    """A longer download is not that file."""
    package: str = ""
    """Name of the archive at the official Cityscapes downloader."""

    def shortage(self, root: Path) -> str:
        """Return what a part in `root` lacks of being complete; empty if nothing."""
        for pattern, least in self.files.items():
            found = sum(1 for _ in root.glob(pattern))
            if found < least:
                return f"{found} of {least} files {pattern}"
        return ""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """How a dataset's generated stand-in is drawn, by `mscs.datasets.toy`."""

    size: tuple[int, int]
    """Default (height, width); the largest where sizes vary."""
    smallest: float = 1.0
    """Sides are drawn between this fraction of the size and the size."""
    paths: Callable[[str, int], tuple[str, str]]
    """From (split, index) to the image and label files."""
    list_of: Callable[[str], str] | None = None
    """From a split to the file that lists its names, where the layout has one."""
    things: str
    """What is drawn, back to front.

    A line with numbers begins a thing: how many, its height and the place (x, y) of the middle of its foot,
    in parts of the picture's height (x: width; from the upper left corner), and its turn about the foot
    (parts of a full clockwise turn); a-b is drawn uniformly. Every line paints one class: colour and texture,
    outline, and the outline's box (left low right high, in thing heights, from the foot)."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One dataset. Adding one: a file with a `SPEC`, and its line in `mscs.datasets.registry`."""

    name: str
    label_sets: tuple[LabelSet, ...]
    """One, or one per task; the last is the default."""
    splits: Mapping[str, int | None]
    """Number of images that the official dataset has in each split; None where nobody says."""
    index: Callable[..., Index]
    """From (labels, split, root, **options) to the samples of a split; options are keyword-only."""
    parts: tuple[Part, ...]
    home: str = ""
    """Page to read or register at; empty for a dataset of the user's own."""
    licence: str = ""
    tolerance: float | None = None
    """Difference in mIoU points (percent) up to which a score counts as published; None: nothing is."""
    digests: Path | None = None
    """SHA-256 of every file, as `sha256sum` lists them, where the official files are known one by one."""
    prepare: Callable[[Path], int] | None = None
    """Converts label files once after fetching; returns how many were converted."""
    toy: Toy | None = None
    """How the generated stand-in is drawn; None where there is none."""

    def labels(self, task: int | None = None) -> LabelSet:
        """Return the label table of a task, None meaning the default; UsageError for an unknown one."""
        for labels in reversed(self.label_sets):
            if task in (None, labels.task):
                return labels
        accepted = ", ".join(f"{labels.task} ({labels.num_classes} classes)" for labels in self.label_sets)
        raise UsageError(f"{self.name} has no task {task!r}. Accepted: {accepted}")

    def open_index(self, split: str, root: Path, task: int | None = None, **options: Any) -> Index:
        """List the samples of a split, or of several: "train+val".

        Raises:
            UsageError: unknown split, task or option.
        """
        labels = self.labels(task)
        accepted = getattr(self.index, "__kwdefaults__", None) or {}
        for option in options:
            if option not in accepted:
                raise UsageError(unknown_name(f"option of {self.name}", option, accepted))
        self.check_split(split)
        found = [self.index(labels, name, root, **options) for name in split.split("+")]
        if any(part.labels != found[0].labels for part in found):
            raise MscsError(f"{self.name}: the splits {split} do not have the same kind of label files")
        return Index([entry for part in found for entry in part.entries], found[0].labels)

    def check_split(self, split: str) -> None:
        """Raise UsageError unless `split` names splits of this dataset, each once."""
        names = split.split("+")
        for name in names:
            if name not in self.splits:
                raise UsageError(unknown_name(f"split of {self.name}", name, self.splits))
        if len(set(names)) < len(names):
            raise UsageError(f"split {split!r} names a split twice")

    def changed_files(self, root: Path) -> list[str]:
        """Return the files that are not the official ones, missing ones too; empty where none are known."""
        lines = self.digests.read_text().splitlines() if self.digests else []
        known = {path: digest for digest, path in (line.split() for line in lines)}
        there = {path for path in known if (root / path).is_file()}
        return [path for path in known if path not in there or file_sha256(root / path) != known[path]]


def default_root(name: str) -> Path:
    """Return the folder of a real dataset: $MSCS_DATA/<name>, else data/<name>."""
    return Path(os.environ.get("MSCS_DATA", "data")) / name


def require_folder(dataset: str, folder: Path) -> Path:
    """Return `folder`, or raise UsageError saying how to get the dataset."""
    if not folder.is_dir():
        raise UsageError(
            f"{dataset}: no folder {folder}. Get the real dataset with `mscs data fetch {dataset}`, "
            f"or generated scenes in the same layout with `mscs data synth {dataset}` "
            "(both take --root; the default is $MSCS_DATA/<name>, else data/<name>)"
        )
    return folder


def names_in(folder: Path, suffix: str) -> list[str]:
    """Return the sorted names of the files in `folder` that end in `suffix`, without the suffix."""
    with os.scandir(folder) as files:
        return sorted(file.name.removesuffix(suffix) for file in files if file.name.endswith(suffix))


def build_index(labels: LabelSet, root: Path, samples: Iterable[tuple[str, str, str]]) -> Index:
    """Return the index of (id, image, label), paths relative to `root`.

    Raises:
        UsageError: no such folder.
        MscsError: no sample, a label file is missing, or a name would lead out of its folder.
    """
    names = functools.cache(lambda folder: set(os.listdir(require_folder(labels.dataset, root / folder))))
    entries = [Entry(*sample) for sample in samples]
    for entry in entries:
        for path in entry:
            inside(root, path)
        folder, file = os.path.split(entry.label)
        if file not in names(folder):
            raise MscsError(
                f"{root / entry.image} has no label: {root / entry.label} is missing. "
                f"Get that file, or fetch {labels.dataset} again"
            )
    if len({entry.id for entry in entries}) < len(entries):
        raise MscsError(f"{labels.dataset}: samples under {root} are listed twice. Fetch the dataset again")
    if not entries:
        raise MscsError(f"{labels.dataset}: found no images under {root}. Fetch the dataset again")
    return Index(entries, labels)
