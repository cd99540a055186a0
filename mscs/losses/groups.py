"""Groups: the images that are contrasted and averaged together, however many processes share a batch.

The authors sampled and averaged per GPU (2 to 4 images). Fixing the group instead of the process makes one
process with four groups compute what four processes with one group each compute.
"""


def check_groups(batch: int, images_per_group: int | None) -> int:
    """Return how many images form a group; a batch that does not divide into groups is a ValueError."""
    per_group = batch if images_per_group is None else images_per_group
    if batch == 0 or per_group < 1 or batch % per_group:
        raise ValueError(
            f"a batch of {batch} images does not divide into groups of {images_per_group}; "
            "the batch on each process must be a multiple of images_per_group"
        )
    return per_group
