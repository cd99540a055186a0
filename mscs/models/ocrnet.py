"""OCRNet (Yuan et al., 2020): pixels attend to one representation per class.

Shapes: B images, C channels, K classes, N = h * w pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mscs.model_options import OCRNetOptions
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
        self.query, self.key = (
            nn.Sequential(
                *conv_norm_relu(channels, key_channels), *conv_norm_relu(key_channels, key_channels)
            )
            for _ in range(2)
        )
        self.value = conv_norm_relu(channels, key_channels)
        self.out = conv_norm_relu(key_channels, channels)
        self.fuse = conv_norm_relu(2 * channels, channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, pixels: Tensor, classes: Tensor) -> Tensor:
        """Return pixels that know their classes."""
        parts = self.query(pixels), self.key(classes), self.value(classes)
        query, key, value = (x.flatten(2).mT for x in parts)
        context = F.scaled_dot_product_attention(query, key, value).mT.unflatten(2, pixels.shape[-2:])
        return self.dropout(self.fuse(torch.cat([self.out(context), pixels], dim=1)))


class OCRNet(SegmentationModel):
    """OCRNet on HRNet's concatenated branches, or on a dilated backbone's last two stages.

    Auxiliary logits come from the concatenation (HRNet) or the last stage but one (others).
    Projector position `backbone`: all four branches (HRNet) or the first and last stage (others).
    Options: see `mscs.model_options.OCRNetOptions`.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, projector: str | None, options: OCRNetOptions
    ) -> None:
        super().__init__(backbone, options)
        self.joined = backbone.family == "hrnet"
        high = sum(backbone.channels) if self.joined else backbone.channels[-1]
        low = high if self.joined else backbone.channels[-2]
        channels, dropout = options.mid_channels, options.dropout
        aux_channels = options.aux_channels or channels
        self.pixels = conv_norm_relu(high, channels, 3, bias=True)
        self.aux_head = FCNHead(low, aux_channels, num_classes, kernel=options.aux_kernel, dropout=dropout)
        self.attention = ClassAttention(channels, options.key_channels, dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        projected = backbone.channels if self.joined else (backbone.channels[0], backbone.channels[-1])
        self.add_projectors(projector, {"backbone": projected})

    def decode(self, features: list[Tensor]) -> Decoded:
        """Return logits and auxiliary logits at the backbone's stride."""
        low, high = features[-2:]
        projected = [features[0], high]
        if self.joined:
            low = high = concatenate(features, self.align_corners)
            projected = features
        aux_logits = self.aux_head(low)
        pixels = self.pixels(high)
        logits = self.classifier(self.attention(pixels, gather_classes(pixels, aux_logits)))
        return Decoded(logits, aux_logits, {"backbone": projected})
