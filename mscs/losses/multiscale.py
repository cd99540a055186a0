"""Eq. 5's contrastive part: within-scale terms, cross-scale terms, and their weighted sum."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from mscs.losses import sampling as pixels
from mscs.losses.contrastive import check_options, prepare, sorted_loss
from mscs.losses.segmentation import check_groups

EMPTY_STEPS = 100
"""After so many calls in a row without a pixel of a scale, one warning says so."""


class LossTerms(NamedTuple):
    """What `MultiScaleContrastiveLoss` returns; every term is a mean over groups of images."""

    total: Tensor
    """Scalar: multi_scale_weight * sum_s w_s * multi_scale_s + cross_scale_weight * sum_p cross_scale_p."""
    multi_scale: Tensor
    """(S,) unweighted within-scale terms, fine to coarse."""
    cross_scale: Tensor
    """(P,) unweighted cross-scale terms, in the order of `cross_pairs`."""
    anchors: Tensor
    """(G, S) int64 on the CPU: anchors N of each group of images at each scale."""
    groups: Tensor
    """(G, S) int64 on the CPU: the number T of (image, class) sets that took part; not groups of images."""
    views: Tensor
    """(G, S) int64 on the CPU: pixels V drawn per set; 0 where none or, with sampling="all", not constant."""

    def __add__(self, _other: object) -> NoReturn:
        """Raise TypeError: what belongs into a loss is `total`."""
        raise TypeError("LossTerms is a record of terms; add its total to the loss: loss + terms.total")

    def __radd__(self, other: object) -> NoReturn:
        """Raise TypeError, as `__add__`."""
        self.__add__(other)


class MultiScaleContrastiveLoss(nn.Module):
    """Contrast pixels within each scale, and the pixels of one scale with those of another.

    Per group of images and scale, anchors are drawn once (`sample_anchors`) and serve the within-scale term
    and every cross-scale pair; in a pair (a, b) the anchors of scale a are contrasted with those of scale b,
    and the gradient reaches both. A group with nothing to contrast contributes 0 and is counted. Under
    DistributedDataParallel nothing is gathered: the averaging of gradients makes the mean over groups.

    Args:
        scale_weights: weight w_s of each scale, fine to coarse (supplement: 1.0, 0.7, 0.4, 0.1).
        cross_pairs: (anchor scale, contrast scale) indices; empty for none.
        multi_scale_weight: factor of the within-scale sum (Eq. 5: 0.1).
        cross_scale_weight: factor of the cross-scale sum (Eq. 5: 0.1).
        temperature: divisor of the cosine similarities.
        images_per_group: images contrasted together (the paper's images per GPU: 2, 3 or 4); None means
            the whole batch.
        sampling: "balanced" (V pixels per image and class) or "all" (every pixel that is not ignored).
        min_views: smallest (image, class) set that takes part when balanced.
        max_views: cap on V when balanced.
        max_anchors: cap on T*V per group and scale when balanced.
        ignore_index: label of pixels that never take part.
        backend: as in `contrastive_loss`.
        precision: as in `contrastive_loss`.

    Raises:
        ValueError: an impossible setting, or inputs that do not fit it.

    Warns:
        UserWarning: once, when a scale had no pixel to contrast in `EMPTY_STEPS` calls in a row; once, when a
            map is larger than the one before it.
    """

    def __init__(
        self,
        scale_weights: Sequence[float] = (1.0, 0.7, 0.4, 0.1),
        cross_pairs: Sequence[tuple[int, int]] = ((0, 3), (0, 2)),
        multi_scale_weight: float = 0.1,
        cross_scale_weight: float = 0.1,
        temperature: float = 0.1,
        images_per_group: int | None = None,
        sampling: str = "balanced",
        min_views: int = 5,
        max_views: int = 2500,
        max_anchors: int = 10000,
        ignore_index: int = 255,
        backend: str = "auto",
        precision: str = "auto",
    ) -> None:
        super().__init__()
        check_options(temperature, backend, precision)
        if sampling not in ("balanced", "all"):
            raise ValueError(f"unknown sampling {sampling!r}; accepted: all, balanced")
        pixels.check_caps(min_views, max_views, max_anchors)
        scales = range(len(scale_weights))
        if not scales or any(a not in scales or b not in scales or a == b for a, b in cross_pairs):
            raise ValueError(
                f"cross_pairs {tuple(cross_pairs)} must name two different scales out of {len(scale_weights)}"
            )
        self.scale_weights = tuple(scale_weights)
        self.cross_pairs = tuple((a, b) for a, b in cross_pairs)
        self.multi_scale_weight = multi_scale_weight
        self.cross_scale_weight = cross_scale_weight
        self.images_per_group = images_per_group
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.sampling = sampling
        self.min_views = min_views
        self.max_views = max_views
        self.max_anchors = max_anchors
        self.backend = backend
        self.precision = precision
        self._empty_steps = [0] * len(self.scale_weights)
        self._warned: set[str] = set()

    def extra_repr(self) -> str:
        """Return the settings, which print(module) shows."""
        names = inspect.signature(MultiScaleContrastiveLoss).parameters
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @torch.compiler.disable
    def forward(
        self,
        features: Sequence[Tensor],
        labels: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> LossTerms:
        """Return the terms of a batch.

        Args:
            features: one (B, C, h_s, w_s) float map per scale, fine to coarse; C must agree within a pair.
            labels: (B, H, W) integer.
            generator: one generator for all groups in turn, or one per group of this process's batch; the
                latter makes the draw of a group independent of how groups are spread over processes.
        """
        term = partial(
            sorted_loss,
            temperature=self.temperature,
            unit=True,
            backend=self.backend,
            precision=self.precision,
        )
        terms, counts = [], []
        for drawn in self._sampled_groups(features, labels, generator):
            with torch.autocast(labels.device.type, enabled=False):
                rows = [(prepare(anchors.features), anchors.labels) for anchors in drawn]
                pairs = [(rows[a], rows[b]) for a, b in self.cross_pairs]
                terms.append(torch.stack([term(*sets) for sets in (*zip(rows), *pairs)]))
            counts.append([(len(anchors.labels), anchors.groups, anchors.views) for anchors in drawn])
        multi_scale, cross_scale = torch.stack(terms).mean(dim=0).tensor_split([len(self.scale_weights)])
        weighted = sum(w * term for w, term in zip(self.scale_weights, multi_scale, strict=True))
        total = self.multi_scale_weight * weighted + self.cross_scale_weight * cross_scale.sum()
        anchors, sets, views = torch.tensor(counts, dtype=torch.int64).unbind(dim=-1)
        self._watch([max(found[scale][0] for found in counts) for scale in range(len(drawn))])
        return LossTerms(total, multi_scale, cross_scale, anchors, sets, views)

    def _watch(self, most_anchors: Sequence[int]) -> None:
        """Warn of a scale that has had no anchor for many calls."""
        for scale, most in enumerate(most_anchors):
            self._empty_steps[scale] = 0 if most else self._empty_steps[scale] + 1
            if self._empty_steps[scale] == EMPTY_STEPS:
                self._warn(
                    "empty",
                    f"scale {scale} had no pixel to contrast in {EMPTY_STEPS} calls and adds nothing to the "
                    f"loss: labels are all {self.ignore_index}, or no class of an image has min_views = "
                    f"{self.min_views} pixels on the map. Lower min_views or use finer maps",
                )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    def _sampled_groups(
        self,
        features: Sequence[Tensor],
        labels: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None,
    ) -> list[list[pixels.Anchors]]:
        """Return the anchors of each group of images at each scale, ordered by class."""
        if isinstance(features, Mapping | Tensor):
            raise ValueError(
                f"features must be a list of maps, fine to coarse; found {type(features).__name__}. "
                "Of a dict pass list(maps.values()), of a single map [map]"
            )
        features = list(features)
        if len(features) != len(self.scale_weights):
            raise ValueError(f"{len(features)} feature maps for {len(self.scale_weights)} scale weights")
        pixels.check_maps(features, labels)
        sizes = [tuple(feature.shape[-2:]) for feature in features]
        if any(finer[0] < coarser[0] or finer[1] < coarser[1] for finer, coarser in pairwise(sizes)):
            self._warn(
                "order",
                f"maps of sizes {sizes} do not go from fine to coarse, as scale_weights and cross_pairs do",
            )
        for a, b in self.cross_pairs:
            channels = features[a].shape[1], features[b].shape[1]
            if channels[0] != channels[1]:
                raise ValueError(f"feature maps {a} and {b} are a pair, but have {channels} channels")
        per_group = check_groups(len(labels), self.images_per_group)
        groups = [slice(first, first + per_group) for first in range(0, len(labels), per_group)]
        caps = (self.min_views, self.max_views, self.max_anchors)
        generators = list(generator) if isinstance(generator, Sequence) else [generator] * len(groups)
        if len(generators) != len(groups):
            raise ValueError(f"{len(generators)} generators for {len(groups)} groups of images")
        pixels.check_generators(generators)
        reduced = [pixels.downsample_labels(labels, *feature.shape[-2:]) for feature in features]
        draws = [
            pixels.draw_all(level[group], self.ignore_index)
            if self.sampling == "all"
            else pixels.draw_balanced(level[group], self.ignore_index, *caps, source, by_class=True)
            for group, source in zip(groups, generators, strict=True)
            for level in reduced
        ]
        chosen = iter(pixels.select(draws))
        return [[next(chosen).gather(feature[group]) for feature in features] for group in groups]
