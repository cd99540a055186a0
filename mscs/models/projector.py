"""The projection heads that turn feature maps into embeddings for the contrastive loss."""

from collections.abc import Sequence

from torch import nn


class Projector(nn.Sequential):
    """1x1 convolution, ReLU, batch norm, 1x1 convolution, as published (norm after ReLU, momentum 3e-4).

    Shape: (B, inputs, H, W) -> (B, outputs, H, W), not normalised: the loss does that.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(inputs, momentum=3e-4),
            nn.Conv2d(inputs, outputs, 1),
        )


def build_projectors(channels: Sequence[int], outputs: int) -> nn.ModuleList:
    """Return one projector per scale, fine to coarse."""
    return nn.ModuleList(Projector(inputs, outputs) for inputs in channels)
