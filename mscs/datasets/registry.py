"""The datasets by name. Standard library only; the one list that every other list of datasets comes from."""

from typing import TYPE_CHECKING, Literal

from mscs.datasets import ade20k, cadis, camvid, cityscapes, pascal_context
from mscs.datasets.spec import LabelSet, Spec
from mscs.errors import UsageError, unknown_name

DATASETS: dict[str, Spec] = {
    "cityscapes": cityscapes.SPEC,
    "ade20k": ade20k.SPEC,
    "pascal_context": pascal_context.SPEC,
    "cadis": cadis.SPEC,
    "camvid": camvid.SPEC,
}
if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[tuple(DATASETS)]
    """For settings: the type of a dataset's name."""


def dataset_spec(name: str) -> Spec:
    """Return the facts of a dataset; UsageError for an unknown name."""
    if name not in DATASETS:
        raise UsageError(unknown_name("dataset", name, DATASETS))
    return DATASETS[name]


def label_set(name: str, task: int | None = None) -> LabelSet:
    """Return the label table of a dataset.

    Args:
        name: one of `DATASETS`.
        task: CaDIS only: 1 (8 classes), 2 (17) or 3 (25); None means 3.

    Raises:
        UsageError: unknown dataset or task.
    """
    return dataset_spec(name).labels(task)
