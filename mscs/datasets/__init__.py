"""Four datasets behind one door: `build_dataset(name, split, root, task)` -> `Dataset` of `Sample`.

Adding a dataset: one module with an `index` function, one line in `build.INDEXERS`, one block in labels.json.
Names are loaded on first use, so that `mscs.datasets.labels` costs neither OpenCV nor NumPy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mscs.datasets.base import Dataset, Sample
    from mscs.datasets.build import build_dataset
    from mscs.datasets.labels import DATASETS, IGNORE_INDEX, LabelSet, label_set

_HOMES = {
    "Dataset": "base",
    "Sample": "base",
    "build_dataset": "build",
    "DATASETS": "labels",
    "IGNORE_INDEX": "labels",
    "LabelSet": "labels",
    "label_set": "labels",
}
__all__ = ["DATASETS", "IGNORE_INDEX", "Dataset", "LabelSet", "Sample", "build_dataset", "label_set"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"mscs.datasets.{_HOMES[name]}"), name)
