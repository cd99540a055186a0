"""Layers that several models share. Shapes: B images, C channels, H x W pixels."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def resize(x: Tensor, size: tuple[int, int] | torch.Size, align_corners: bool) -> Tensor:
    """Return `x` (B, C, h, w) resized bilinearly to `size` (H, W); the same tensor if it has that size."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def concatenate(features: list[Tensor], align_corners: bool) -> Tensor:
    """Return all feature maps resized to the first one's size and concatenated, (B, sum of C, h, w)."""
    size = features[0].shape[-2:]
    return torch.cat([resize(x, size, align_corners) for x in features], dim=1)


def conv_norm_relu(
    inputs: int, outputs: int, kernel: int = 1, *, dilation: int = 1, bias: bool = False, eps: float = 1e-5
) -> nn.Sequential:
    """Return a size-preserving convolution, batch norm and ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=bias),
        nn.BatchNorm2d(outputs, eps=eps),
        nn.ReLU(inplace=True),
    )


class FCNHead(nn.Sequential):
    """Convolution, batch norm, optional ReLU and channel dropout, then a 1x1 classifier.

    Args:
        inputs: channels of the feature map.
        channels: channels between the two convolutions.
        num_classes: K, channels of the result.
        kernel: size of the first convolution.
        relu: whether a ReLU follows the norm.
        dropout: probability of dropping a whole channel, in [0, 1).
        classifier_bias: whether the classifier has a bias.

    Shape: (B, inputs, H, W) -> (B, K, H, W).
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        num_classes: int,
        *,
        kernel: int = 3,
        relu: bool = True,
        dropout: float = 0.0,
        classifier_bias: bool = True,
    ) -> None:
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(inputs, channels, kernel, padding=kernel // 2),
                norm=nn.BatchNorm2d(channels),
                act=nn.ReLU(inplace=True) if relu else nn.Identity(),
                dropout=nn.Dropout2d(dropout),
                classifier=nn.Conv2d(channels, num_classes, 1, bias=classifier_bias),
            )
        )


class Projector(nn.Sequential):
    """Turns a feature map into embeddings, with the norm after the ReLU and momentum 3e-4, as published.

    Shape: (B, inputs, H, W) -> (B, outputs, H, W), not normalised: the loss does that.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(inputs, momentum=3e-4),
            nn.Conv2d(inputs, outputs, 1),
        )
