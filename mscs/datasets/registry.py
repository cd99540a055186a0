"""The datasets by name. Standard library only; the one list that every other list of them comes from."""

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


def dataset_spec(dataset: str | Spec) -> Spec:
    """Return the facts of a dataset by name, or as they are; UsageError for an unknown name."""
    if isinstance(dataset, Spec):
        return dataset
    if dataset not in DATASETS:
        raise UsageError(unknown_name("dataset", dataset, DATASETS))
    return DATASETS[dataset]


def label_set(name: str, task: int | None = None) -> LabelSet:
    """Return the label table of a dataset.

    Args:
        name: one of `DATASETS`.
        task: CaDIS only: 1 (8 classes), 2 (17) or 3 (25); None means 3.

    Raises:
        UsageError: unknown dataset or task.
    """
    return dataset_spec(name).labels(task)
