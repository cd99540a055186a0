"""From a dataset's name to its reader."""

from os import PathLike
from pathlib import Path
from typing import Any

from mscs.datasets import ade20k, cadis, cityscapes, pascal_context
from mscs.datasets.base import Dataset, Indexer
from mscs.datasets.labels import label_set
from mscs.errors import UsageError, unknown_name

INDEXERS: dict[str, Indexer] = {
    "cityscapes": cityscapes.index,
    "ade20k": ade20k.index,
    "pascal_context": pascal_context.index,
    "cadis": cadis.index,
}


def build_dataset(
    name: str, split: str, root: str | PathLike[str], task: int | None = None, **options: Any
) -> Dataset:
    """Open a split of a dataset.

    Args:
        name: cityscapes, ade20k, pascal_context or cadis.
        split: train, val or (cityscapes, cadis) test.
        root: folder of this dataset, in the layout that its module describes.
        task: CaDIS only: 1, 2 or 3 (the default).
        options: of the dataset's `index` function (cadis: exclude_blacklisted).

    Raises:
        UsageError: unknown name, split, task or option; missing folder.
        MscsError: empty folder, image without label.
    """
    labels = label_set(name, task)
    if split not in labels.splits:
        raise UsageError(unknown_name(f"split of {name}", split, labels.splits))
    accepted = INDEXERS[name].__kwdefaults__ or {}
    for option in options:
        if option not in accepted:
            raise UsageError(unknown_name(f"option of {name}", option, accepted))
    root = Path(root)
    return Dataset(labels, split, root, INDEXERS[name](labels, split, root, **options))
