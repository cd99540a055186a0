"""A dataset of the user's own: folders of images and of labels, as a block of params.yaml names them."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from mscs.datasets.spec import Color, Index, LabelSet, Part, Spec, build_index, names_in, voc_palette
from mscs.errors import UsageError


def folder_spec(
    name: str,
    folders: Mapping[str, tuple[str, str]],
    classes: Sequence[str],
    *,
    image_suffix: str = ".png",
    label_suffix: str = ".png",
    class_values: Sequence[int | tuple[int, ...]] | None = None,
    ignored_values: Sequence[int] = (255,),
    colors: Sequence[Color] | None = None,
) -> Spec:
    """Return the facts of a dataset in folders: an image and its label have one name, up to the suffixes.

    Args:
        name: of the dataset.
        folders: from a split to its folder of images and its folder of labels, below the root folder. Folders
            within these are not looked into.
        classes: names, 2 to 255; the position is the training id.
        image_suffix: end of the names of image files, all that follows the common name.
        label_suffix: the same of label files, which hold 8-bit class values (grey or indexed colour).
        class_values: per class the value, or values, that stand for it in label files; None: 0, 1, 2, ...
        ignored_values: values in label files that are neither trained nor scored. Any other is an error.
        colors: per class (red, green, blue); None: those of Pascal VOC.

    Raises:
        UsageError: classes, values and colours do not fit each other.
    """
    values = range(len(classes)) if class_values is None else class_values
    labels = LabelSet(
        dataset=name,
        classes=tuple(classes),
        raw_ids=tuple((value,) if isinstance(value, int) else tuple(value) for value in values),
        ignored_raw_ids=tuple(ignored_values),
        colors=voc_palette(len(classes)) if colors is None else tuple(colors),
    )
    _check(labels)
    suffixes = (image_suffix, label_suffix)
    files = [f"{top}/*{end}" for pair in folders.values() for top, end in zip(pair, suffixes, strict=True)]
    tops = dict.fromkeys(pattern.split("/")[0] for pattern in files)
    return Spec(
        name=name,
        label_sets=(labels,),
        splits=dict.fromkeys(folders),
        index=partial(_index, folders, suffixes),
        parts=tuple(Part(top, {p: 1 for p in files if p.split("/")[0] == top}) for top in tops),
    )


def _check(labels: LabelSet) -> None:
    count, different = len(labels.classes), len(set(labels.classes))
    if not 2 <= different == count <= 255:
        raise UsageError(f"classes: found {count} names, {different} different ones; expected 2 to 255")
    for key, number in (("class_values", len(labels.raw_ids)), ("colors", len(labels.colors))):
        if number != count:
            raise UsageError(f"{key}: found {number} for {count} classes; expected one for each, in order")
    values = [*chain(*labels.raw_ids, labels.ignored_raw_ids)]
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise UsageError(
            f"class_values, ignored_values: found {twice} twice; a value stands for one class or is ignored"
        )


def _index(
    folders: Mapping[str, tuple[str, str]],
    suffixes: tuple[str, str],
    labels: LabelSet,
    split: str,
    root: Path,
) -> Index:
    """List a split."""
    for folder in folders[split]:
        if not (root / folder).is_dir():
            raise UsageError(
                f"{labels.dataset}: no folder {root / folder}, named in params.yaml for split {split!r}. "
                f"Link the dataset with `mscs data fetch {labels.dataset} --from FOLDER`, or name its folder "
                "with --root (`mscs data`) or --data-root (train, evaluate)"
            )
    (images, masks), (image_suffix, label_suffix) = folders[split], suffixes
    names = names_in(root / images, image_suffix)
    if not names:
        raise UsageError(
            f"{labels.dataset}: no name in {root / images} ends in {image_suffix!r} (image_suffix)"
        )
    samples = ((n, f"{images}/{n}{image_suffix}", f"{masks}/{n}{label_suffix}") for n in names)
    return build_index(labels, root, samples)
