"""DeepLabV3 (Chen et al., 2017): dilated convolutions at several rates beside the image's mean."""

import torch
from torch import Tensor, nn

from mscs.model_options import DeepLabV3Options
from mscs.models.backbone import Backbone
from mscs.models.base import Decoded, SegmentationModel
from mscs.models.layers import conv_norm_relu


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, one 3x3 per rate, image mean, fused by a 1x1 convolution.

    Shape: (B, inputs, h, w) -> (B, channels, h, w).
    """

    def __init__(self, inputs: int, channels: int, rates: tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            [
                conv_norm_relu(inputs, channels, eps=eps),
                *(conv_norm_relu(inputs, channels, 3, dilation=rate, eps=eps) for rate in rates),
            ]
        )
        self.mean = conv_norm_relu(inputs, channels, eps=eps)
        self.fuse = conv_norm_relu((len(rates) + 2) * channels, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return the fused map."""
        mean = self.mean(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return self.fuse(torch.cat([*(path(x) for path in self.paths), mean], dim=1))


class DeepLabV3(SegmentationModel):
    """DeepLabV3 without auxiliary head.

    Projector position `backbone`: the first, third and fourth stage (C2, C4, C5). Options: see
    `mscs.model_options.DeepLabV3Options`.
    """

    projected = (0, 2, 3)

    def __init__(
        self, backbone: Backbone, num_classes: int, projector: str | None, options: DeepLabV3Options
    ) -> None:
        super().__init__(backbone, options)
        channels = options.aspp_channels
        self.aspp = ASPP(backbone.channels[-1], channels, options.aspp_rates, options.aspp_bn_eps)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.add_projectors(projector, {"backbone": [backbone.channels[i] for i in self.projected]})

    def decode(self, features: list[Tensor]) -> Decoded:
        """Return logits at the backbone's stride."""
        maps = [features[i] for i in self.projected]
        return Decoded(self.classifier(self.aspp(features[-1])), None, {"backbone": maps})
