"""What all models have in common: the output record, the checks of the input, the projectors."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from mscs.errors import UsageError
from mscs.model_options import ModelOptions
from mscs.models.backbone import Backbone
from mscs.models.layers import Projector, resize

ONE_VALUE = (
    "batch norm cannot train on one value per channel: one image whose coarsest feature map is one pixel or "
    "is pooled to one. Use larger images, at least two images per process, synchronised batch norm, eval() "
    "or, for UPerNet, ppm_upsample_first=True"
)


class ModelOutput(NamedTuple):
    """What every model returns, in training and in evaluation.

    Attributes:
        logits: (B, K, H, W) at input size.
        aux_logits: (B, K, H, W) at input size, or None if the model has no auxiliary head.
        embeddings: one (B, D, h, w) per scale, fine to coarse, not normalised; None without projectors.
    """

    logits: Tensor
    aux_logits: Tensor | None
    embeddings: list[Tensor] | None


class Decoded(NamedTuple):
    """What a head makes of the backbone's features.

    Attributes:
        logits: (B, K, h, w) at the head's own size.
        aux_logits: the same for the auxiliary head, or None.
        maps: for each projector position the feature maps that projectors read, fine to coarse.
    """

    logits: Tensor
    aux_logits: Tensor | None
    maps: Mapping[str, Sequence[Tensor]]


class SegmentationModel(nn.Module):
    """A backbone, a head and, while training with the contrastive loss, projectors.

    A subclass takes backbone, number of classes, projector position and its options, builds its head, calls
    `add_projectors` last (so that the weights drawn for the rest do not depend on them) and has `decode`.
    """

    def __init__(self, backbone: Backbone, options: ModelOptions) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = options
        self.align_corners = options.align_corners
        self.projector: str | None = None
        self.projectors: nn.ModuleList | None = None  # registered after the head

    def add_projectors(self, position: str | None, channels: Mapping[str, Sequence[int]]) -> None:
        """Attach projectors at `position`, a key of `channels` (channels per scale); None attaches none."""
        if position is None:
            return
        if position not in channels:
            raise UsageError(
                f"{type(self).__name__} has no projector position {position!r}; "
                f"accepted: {', '.join(channels)} or None"
            )
        self.projector = position
        outputs = self.options.projector_channels
        self.projectors = nn.ModuleList(Projector(inputs, outputs) for inputs in channels[position])

    def drop_projector(self) -> None:
        """Remove the projectors; logits stay the same."""
        self.projector = self.projectors = None

    def decode(self, features: list[Tensor]) -> Decoded:
        """Return logits and projector inputs for the backbone's features, fine to coarse."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> ModelOutput:
        """Return logits and embeddings of `images` (B, 3, H, W), normalised as the backbone was trained."""
        self._check(images)
        embeddings = None
        try:
            decoded = self.decode(self.backbone(images))
            if self.projectors is not None and self.projector is not None:
                maps = decoded.maps[self.projector]
                embeddings = [project(x) for project, x in zip(self.projectors, maps, strict=True)]
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError(ONE_VALUE) from error
        size = images.shape[-2:]
        aux_logits = decoded.aux_logits
        if aux_logits is not None:
            aux_logits = resize(aux_logits, size, self.align_corners)
        return ModelOutput(resize(decoded.logits, size, self.align_corners), aux_logits, embeddings)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not len(images) or not images.is_floating_point():
            raise UsageError(
                "images must be normalised, of a floating type and of shape (B, 3, H, W) with B at least 1; "
                f"found {images.dtype} {tuple(images.shape)}"
            )
        stride = self.backbone.strides[-1]
        height, width = images.shape[-2:]
        if height < stride or width < stride:
            raise UsageError(
                f"images are {height}x{width} pixels, smaller than the stride {stride} of the backbone; "
                f"use at least {stride}x{stride}"
            )
