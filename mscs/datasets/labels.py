"""Names that generated data still imports from here; they live in `registry`, `spec` and `cadis`."""

from mscs.datasets.cadis import RAW_CLASSES, VIDEOS
from mscs.datasets.registry import DATASETS, dataset_spec, label_set
from mscs.datasets.spec import GENERATED

__all__ = ["DATASETS", "GENERATED", "cadis_raw_classes", "cadis_videos", "check_dataset", "label_set"]
check_dataset = dataset_spec


def cadis_videos(split: str) -> tuple[int, ...]:
    """Return the numbers of the CaDIS videos of a split."""
    return VIDEOS[split]


def cadis_raw_classes() -> tuple[str, ...]:
    """Return the 36 CaDIS classes by raw label value."""
    return RAW_CLASSES
