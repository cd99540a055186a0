"""OCRNet (Yuan et al., 2020): pixels attend to one representation per class.

Shapes: B images, C channels, K classes, N = h * w pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mscs.models.backbone import Backbone
from mscs.models.base import Decoded, SegmentationModel
from mscs.models.layers import FCNHead, concatenate, conv_norm_relu


def gather_classes(pixels: Tensor, logits: Tensor) -> Tensor:
    """Return each class's mean pixel feature, weighted by a softmax of its logits over the pixels.

    Shape: (B, C, h, w), (B, K, h, w) -> (B, C, K, 1).
    """
    weights = logits.flatten(2).softmax(dim=2)
    return (weights @ pixels.flatten(2).mT).mT.unsqueeze(-1)


class ClassAttention(nn.Module):
    """Attention from pixels to class representations, added to the pixels by concatenation.

    Shape: (B, channels, h, w), (B, channels, K, 1) -> (B, channels, h, w).
    """

    def __init__(self, channels: int, key_channels: int, dropout: float) -> None:
        super().__init__()
        self.query = nn.Sequential(
            *conv_norm_relu(channels, key_channels), *conv_norm_relu(key_channels, key_channels)
        )
        self.key = nn.Sequential(
            *conv_norm_relu(channels, key_channels), *conv_norm_relu(key_channels, key_channels)
        )
        self.value = conv_norm_relu(channels, key_channels)
        self.out = conv_norm_relu(key_channels, channels)
        self.fuse = conv_norm_relu(2 * channels, channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, pixels: Tensor, classes: Tensor) -> Tensor:
        """Return pixels that know their classes."""
        query, key, value = (
            x.flatten(2).mT for x in (self.query(pixels), self.key(classes), self.value(classes))
        )
        context = F.scaled_dot_product_attention(query, key, value).mT.unflatten(2, pixels.shape[-2:])
        return self.dropout(self.fuse(torch.cat([self.out(context), pixels], dim=1)))


class OCRNet(SegmentationModel):
    """OCRNet on HRNet's concatenated branches, or on a dilated backbone's last two stages.

    Auxiliary logits come from the concatenation (HRNet) or the last stage but one (others).
    Projector position `backbone`: all four branches (HRNet) or the first and last stage (others).
    Options: see `mscs.models.options`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        projector: str | None,
        *,
        align_corners: bool,
        mid_channels: int,
        key_channels: int,
        aux_channels: int | None,
        aux_kernel: int,
        dropout: float,
        projector_channels: int,
    ) -> None:
        super().__init__(backbone, align_corners=align_corners)
        self.joined = backbone.family == "hrnet"
        high = sum(backbone.channels) if self.joined else backbone.channels[-1]
        low = high if self.joined else backbone.channels[-2]
        self.pixels = conv_norm_relu(high, mid_channels, 3, bias=True)
        self.aux_head = FCNHead(
            low, aux_channels or mid_channels, num_classes, kernel=aux_kernel, dropout=dropout
        )
        self.attention = ClassAttention(mid_channels, key_channels, dropout)
        self.classifier = nn.Conv2d(mid_channels, num_classes, 1)
        channels = backbone.channels if self.joined else (backbone.channels[0], backbone.channels[-1])
        self.add_projectors(projector, {"backbone": channels}, projector_channels)

    def decode(self, features: list[Tensor]) -> Decoded:
        """Return logits and auxiliary logits at the backbone's stride."""
        if self.joined:
            high = low = concatenate(features, self.align_corners)
            maps = features
        else:
            low, high = features[-2:]
            maps = [features[0], features[-1]]
        aux_logits = self.aux_head(low)
        pixels = self.pixels(high)
        logits = self.classifier(self.attention(pixels, gather_classes(pixels, aux_logits)))
        return Decoded(logits, aux_logits, {"backbone": maps})
