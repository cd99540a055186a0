"""Eq. (5): class-weighted cross-entropy, auxiliary cross-entropy, and losses on the embeddings."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mscs.losses.multiscale import MultiScaleContrastiveLoss
from mscs.losses.segmentation import segmentation_loss

Output = tuple[Tensor, Tensor | None, list[Tensor] | None]
"""Logits (B, K, H, W), auxiliary logits or None, and embeddings or None, as in `mscs.models.ModelOutput`."""


class Terms(NamedTuple):
    """A loss and what it consists of.

    total: scalar, weighted as it is trained. terms: its parts by name, unweighted scalars. counts: what took
    part, by name, means over groups of images.
    """

    total: Tensor
    terms: dict[str, Tensor]
    counts: dict[str, Tensor]


class EmbeddingLoss(nn.Module):
    """The contract of a loss on embeddings: `forward(embeddings, labels, generators)` -> `Terms`.

    embeddings: one (B, D, h, w) per scale, fine to coarse. labels: (B, H, W), 255 = ignored. generators: one
    per group of images, for all random choices. Buffers of the module are saved in checkpoints.
    """

    def forward(
        self, embeddings: Sequence[Tensor], labels: Tensor, generators: Sequence[torch.Generator]
    ) -> Terms:
        """Return the weighted loss with its terms and counts."""
        raise NotImplementedError


class ContrastiveTerms(EmbeddingLoss):
    """The paper's loss as a term of the objective, on every `subsample`-th row and column of each map."""

    def __init__(self, contrastive: MultiScaleContrastiveLoss, subsample: int = 1) -> None:
        super().__init__()
        self.contrastive = contrastive
        self.subsample = subsample

    def forward(
        self, embeddings: Sequence[Tensor], labels: Tensor, generators: Sequence[torch.Generator]
    ) -> Terms:
        """Return the terms of Eqs. (3) and (4) and the numbers of anchors, sets and views."""
        step = self.subsample
        record = self.contrastive([x[:, :, ::step, ::step] for x in embeddings], labels, generators)
        terms = _by_scale(multi_scale=record.multi_scale, cross_scale=record.cross_scale)
        numbers = {name: getattr(record, name).double().mean(0) for name in ("anchors", "groups", "views")}
        return Terms(record.total, terms, _by_scale(**numbers))


def _by_scale(**values: Tensor) -> dict[str, Tensor]:
    return {f"{name}_{i}": value for name, vector in values.items() for i, value in enumerate(vector)}


class Objective(nn.Module):
    """The training objective; its state, if a loss has any, goes into checkpoints.

    Args:
        images_per_group: images averaged together.
        aux_weight: factor of the auxiliary cross-entropy.
        class_weights: (K,) of the cross-entropy, or None.
        on_embeddings: losses on the embeddings, added up.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        images_per_group: int,
        aux_weight: float = 0.0,
        class_weights: Tensor | None = None,
        on_embeddings: Sequence[EmbeddingLoss] = (),
    ) -> None:
        super().__init__()
        self.images_per_group = images_per_group
        self.aux_weight = aux_weight
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.on_embeddings = nn.ModuleList(on_embeddings)

    def forward(self, output: Output, labels: Tensor, generators: Sequence[torch.Generator]) -> Terms:
        """Return the total loss, its named terms (unweighted) and counts (means over groups)."""
        logits, aux_logits, embeddings = output
        total = self._cross_entropy(logits, labels)
        terms = {"ce": total}
        counts: dict[str, Tensor] = {}
        if aux_logits is not None:
            # with weight 0 too: processes that share gradients must all have one for every parameter
            aux = self._cross_entropy(aux_logits, labels)
            terms |= {"aux": aux} if self.aux_weight else {}
            total = total + self.aux_weight * aux
        for loss in self.on_embeddings:
            assert embeddings is not None
            part = loss(embeddings, labels, generators)
            total = total + part.total
            terms |= part.terms
            counts |= part.counts
        return Terms(total, terms, counts)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return segmentation_loss(
            logits, labels, class_weights=self.class_weights, images_per_group=self.images_per_group
        )
