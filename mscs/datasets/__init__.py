"""The datasets: `build_dataset(name, split, root, task)` -> `Dataset` of `Sample`; their facts in `DATASETS`.

What needs OpenCV and NumPy is loaded on first use, so that names and label tables cost nothing.
"""

from typing import TYPE_CHECKING, Any

from mscs.datasets.registry import DATASETS, label_set
from mscs.datasets.spec import IGNORE_INDEX, LabelSet, Spec

if TYPE_CHECKING:
    from mscs.datasets.base import Dataset, Sample, build_dataset

__all__ = [
    "DATASETS",
    "IGNORE_INDEX",
    "Dataset",
    "LabelSet",
    "Sample",
    "Spec",
    "build_dataset",
    "label_set",
]


def __getattr__(name: str) -> Any:
    if name not in ("Dataset", "Sample", "build_dataset"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mscs.datasets import base

    return getattr(base, name)
