"""Which pixels become anchors: equally many from every class of every image, by one sort of one key.

A pixel's key is (image, class, 40 random bits). After sorting, each (image, class) set is one contiguous
run in random order, so its first V entries are a uniform draw without replacement. The host must know T
and V; one synchronisation reads them for any number of maps, and whether the labels were valid.
"""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

_RANDOM_BITS = 40  # two of n keys tie with probability about n^2 / 2^41
_CLASS_BITS = 12
_CLASSES = 1 << _CLASS_BITS
_MAX_IMAGES = (1 << 11) - 1
_LAST = torch.iinfo(torch.int64).max  # sorts ignored pixels behind all others


class Anchors(NamedTuple):
    """Sampled pixels, ordered by image, then class, V rows for each of T (image, class) sets."""

    features: Tensor
    """(T*V, C) as given: neither converted nor normalised."""
    labels: Tensor
    """(T*V,) int64 class of each row."""
    groups: int
    """T, the number of (image, class) sets with at least `min_views` pixels."""
    views: int
    """V, pixels drawn from each set; 0 when nothing was drawn."""


class Selection(NamedTuple):
    """Positions of the chosen pixels in a flattened (B, h, w) map, their classes, and T and V."""

    positions: Tensor
    labels: Tensor
    groups: int
    views: int

    def gather(self, features: Tensor) -> Anchors:
        """Return the chosen pixels of a (B, C, h, w) map."""
        return Anchors(gather_pixels(features, self.positions), *self[1:])


class Draw(NamedTuple):
    """A choice of pixels of a (B, h, w) map, ready on the device but for two counts the host must know."""

    counts: Tensor
    """(3,) int64: the two arguments of `choose`, and whether a label is invalid."""
    choose: Callable[[int, int], Selection]
    """Returns the chosen pixels."""


def sample_anchors(
    features: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    min_views: int = 5,
    max_views: int = 2500,
    max_anchors: int = 10000,
    generator: torch.Generator | None = None,
) -> Anchors:
    """Draw V pixels without replacement from every (image, class) set of at least `min_views` pixels.

    V is the size of the smallest such set, at most `max_views`, and at most `max_anchors` / T so that T*V
    stays within the budget (supplement, implementation details; V is at least 1).

    Args:
        features: (B, C, h, w), any float dtype and memory layout.
        labels: (B, H, W) integer, 0..4095 or `ignore_index`; reduced to (h, w) by nearest neighbour.
        ignore_index: label of pixels that are never drawn; any integer.
        min_views: smallest set that takes part.
        max_views: cap on V.
        max_anchors: cap on T*V.
        generator: source of randomness, on the CPU or on the labels' device; a CPU generator draws the
            same pixels on every device.

    Raises:
        ValueError: wrong shapes, non-integer labels, or a label outside the range.
    """
    check_maps([features], labels)
    check_caps(min_views, max_views, max_anchors)
    check_generators([generator])
    reduced = downsample_labels(labels, *features.shape[-2:])
    draw = draw_balanced(reduced, ignore_index, min_views, max_views, max_anchors, generator)
    return select([draw])[0].gather(features)


def check_maps(features: list[Tensor], labels: Tensor) -> None:
    """Raise ValueError unless all feature maps are (B, C, h, w) and labels an integer (B, H, W) map."""
    if labels.dim() != 3 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be an integer map (B, H, W); found {labels.dtype} {tuple(labels.shape)}"
        )
    for level, feature in enumerate(features):
        if feature.dim() != 4 or len(feature) != len(labels) or not feature.is_floating_point():
            raise ValueError(
                f"feature map {level} must be float (B, C, h, w) with B = {len(labels)}; "
                f"found {feature.dtype} {tuple(feature.shape)}"
            )
        if feature.device != labels.device:
            raise ValueError(f"feature map {level} is on {feature.device}, the labels on {labels.device}")


def check_caps(min_views: int, max_views: int, max_anchors: int) -> None:
    """Raise ValueError unless all three are whole numbers from 1."""
    for name, value in (("min_views", min_views), ("max_views", max_views), ("max_anchors", max_anchors)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, found {value!r}")


def check_generators(generators: Sequence[object]) -> None:
    """Raise ValueError unless each is a generator or None, which stands for PyTorch's global generator."""
    for generator in generators:
        if not isinstance(generator, torch.Generator | None):
            raise ValueError(
                f"generator must be a torch.Generator or None; found {generator!r}. "
                "For a seed pass torch.Generator().manual_seed(seed)"
            )


def downsample_labels(labels: Tensor, height: int, width: int) -> Tensor:
    """Return the (B, height, width) nearest neighbours: output i is input floor(i * H / height)."""
    rows = torch.arange(height, device=labels.device) * labels.shape[1] // height
    columns = torch.arange(width, device=labels.device) * labels.shape[2] // width
    return labels[:, rows[:, None], columns]


def select(draws: Sequence[Draw]) -> list[Selection]:
    """Finish any number of draws in one host synchronisation.

    Raises:
        ValueError: a label is neither 0..4095 nor the ignored one.
    """
    counts = torch.stack([draw.counts for draw in draws]).tolist()
    if any(invalid for _, _, invalid in counts):
        raise ValueError(
            f"labels must be 0..{_CLASSES - 1} or ignore_index; found values outside. "
            "Map them, or set ignore_index to the value of the pixels that do not count"
        )
    return [draw.choose(first, second) for draw, (first, second, _) in zip(draws, counts, strict=True)]


def draw_balanced(
    labels: Tensor,
    ignore_index: int,
    min_views: int,
    max_views: int,
    max_anchors: int,
    generator: torch.Generator | None = None,
    by_class: bool = False,
) -> Draw:
    """Draw V random pixels from each (image, class) set, by image, then class; or by class, then image."""
    sets, valid, size, invalid = _sets(labels, ignore_index)
    device = labels.device if generator is None else generator.device
    pinned = labels.is_cuda and device.type == "cpu"  # a copy from pageable memory would synchronise
    noise = torch.randint(
        1 << _RANDOM_BITS, sets.shape, generator=generator, device=device, pin_memory=pinned
    )
    # the set decides the order and the random low bits only the order within a set: one sort shuffles
    # every set at once. 11 + 12 + 40 bits of image, class and noise leave the sign bit clear
    key = (sets << _RANDOM_BITS) | noise.to(labels.device, non_blocking=True)
    order = torch.sort(key.where(valid, _LAST)).indices
    usable = size >= min_views
    smallest = size.where(usable, len(sets)).amin()

    def choose(groups: int, smallest: int) -> Selection:
        if groups == 0:
            return Selection(order[:0], order[:0], 0, 0)
        views = max(1, min(smallest, max_views, max_anchors // groups))
        chosen = torch.sort(usable.int(), descending=True, stable=True).indices[:groups]
        if by_class:
            chosen = chosen[torch.sort(chosen & (_CLASSES - 1), stable=True).indices]
        start = (size.cumsum(0) - size)[chosen]
        positions = order[(start[:, None] + torch.arange(views, device=start.device)).flatten()]
        classes = (chosen & (_CLASSES - 1)).repeat_interleave(views, output_size=groups * views)
        return Selection(positions, classes, groups, views)

    return Draw(torch.stack((usable.sum(), smallest, invalid)), choose)


def draw_all(labels: Tensor, ignore_index: int) -> Draw:
    """Draw every pixel that is not ignored, by class; V is not constant and given as 0."""
    sets, valid, size, invalid = _sets(labels, ignore_index)
    classes, order = torch.sort((sets & (_CLASSES - 1)).where(valid, _CLASSES), stable=True)

    def choose(count: int, groups: int) -> Selection:
        return Selection(order[:count], classes[:count], groups, 0)

    return Draw(torch.stack((valid.sum(), (size > 0).sum(), invalid)), choose)


def _sets(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each pixel's set, whether it is not ignored, each set's size, and whether a label is invalid.

    A set is an image and a class in one number, image in the high bits, so that sets sort by image, then
    class. Ignored pixels have the set of class 0, and are not counted in its size.
    """
    if len(labels) > _MAX_IMAGES:
        raise ValueError(f"at most {_MAX_IMAGES} images can be sampled together; found {len(labels)}")
    classes = labels.flatten(1).long()
    valid = classes != ignore_index
    classes = classes.where(valid, 0)
    images = torch.arange(len(labels), device=labels.device)[:, None]
    sets = ((images << _CLASS_BITS) | (classes & (_CLASSES - 1))).flatten()
    # a count for every set that could exist: its length needs no look at the labels
    size = sets.new_zeros(max(1, len(labels)) << _CLASS_BITS)
    size.scatter_add_(0, sets, valid.flatten().long())
    return sets, valid.flatten(), size, (classes >> _CLASS_BITS).any().long()


def gather_pixels(features: Tensor, positions: Tensor) -> Tensor:
    """Return the (N, C) rows of a (B, C, h, w) map at distinct positions of the flattened (B, h, w) map."""
    return _GatherPixels.apply(features, positions)


class _GatherPixels(torch.autograd.Function):
    """Indexing whose backward writes each row once, instead of accumulating as general indexing must."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, positions: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        rows = positions // width
        index = rows // height, rows % height, positions % width
        ctx.save_for_backward(*index)
        channels_last = features.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if channels_last else torch.contiguous_format
        ctx.shape = features.shape
        return features.permute(0, 2, 3, 1)[index]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        result = torch.empty(
            ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout
        ).zero_()
        result.permute(0, 2, 3, 1)[ctx.saved_tensors] = grad
        return result, None
