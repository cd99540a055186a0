"""UPerNet (Xiao et al., 2018): pyramid pooling on the coarsest map, a feature pyramid below it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mscs.errors import UsageError
from mscs.model_options import UPerNetOptions
from mscs.models.backbone import Backbone
from mscs.models.base import Decoded, SegmentationModel
from mscs.models.layers import FCNHead, concatenate, conv_norm_relu, resize


class PyramidPooling(nn.Module):
    """The coarsest map beside its averages over grids of `pool_sizes`, fused by a 3x3 convolution.

    `upsample_first` convolves after upsampling, as the authors' code does. The two orders differ: bilinear
    interpolation does not commute with batch norm and ReLU.

    Shape: (B, inputs, h, w) -> (B, channels, h, w).
    """

    def __init__(self, inputs: int, channels: int, pool_sizes: tuple[int, ...], upsample_first: bool) -> None:
        super().__init__()
        self.pool_sizes = tuple(pool_sizes)
        self.upsample_first = upsample_first
        self.convs = nn.ModuleList(conv_norm_relu(inputs, channels) for _ in pool_sizes)
        self.fuse = conv_norm_relu(inputs + len(pool_sizes) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the fused map."""
        maps = [x]
        for size, conv in zip(self.pool_sizes, self.convs, strict=True):
            pooled = F.adaptive_avg_pool2d(x, size)
            if self.upsample_first:
                maps.append(conv(resize(pooled, x.shape[-2:], False)))
            else:
                maps.append(resize(conv(pooled), x.shape[-2:], False))
        return self.fuse(torch.cat(maps, dim=1))


class UPerNet(SegmentationModel):
    """UPerNet with an optional auxiliary head.

    Projector positions: `backbone` (one per backbone feature) and `fpn` (one per pyramid level, the coarsest
    being the pooled map). Options: see `mscs.model_options.UPerNetOptions`.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, projector: str | None, options: UPerNetOptions
    ) -> None:
        super().__init__(backbone, options)
        channels = options.channels
        *fine, coarsest = backbone.channels
        self.ppm = PyramidPooling(coarsest, channels, options.pool_sizes, options.ppm_upsample_first)
        self.lateral = nn.ModuleList(conv_norm_relu(inputs, channels) for inputs in fine)
        self.smooth = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in fine)
        self.fuse = conv_norm_relu(len(backbone.channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(options.dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.aux_index = self._resolve_aux_index(options.aux_index)
        self.aux_head: FCNHead | None = None
        if self.aux_index is not None:
            inputs = backbone.channels[self.aux_index]
            self.aux_head = FCNHead(inputs, options.aux_channels, num_classes, dropout=options.dropout)
        levels = {"backbone": backbone.channels, "fpn": [channels] * len(backbone.channels)}
        self.add_projectors(projector, levels)

    def _resolve_aux_index(self, index: int | str | None) -> int | None:
        if index == "auto":
            return 2 if self.backbone.family == "swin" else None
        if index is None or (isinstance(index, int) and 0 <= index < len(self.backbone.channels)):
            return index
        last = len(self.backbone.channels) - 1
        raise UsageError(f"aux_index must be 'auto', None or a stage from 0 to {last}, found {index!r}")

    def decode(self, features: list[Tensor]) -> Decoded:
        """Return logits at the finest stride, auxiliary logits at their stage's stride."""
        top_down = self.ppm(features[-1])
        levels = [top_down]
        for i in reversed(range(len(self.lateral))):
            lateral = self.lateral[i](features[i])
            top_down = lateral + resize(top_down, lateral.shape[-2:], self.align_corners)
            levels.insert(0, self.smooth[i](top_down))
        joined = concatenate(levels, self.align_corners)
        logits = self.classifier(self.dropout(self.fuse(joined)))
        aux_logits = None
        if self.aux_head is not None and self.aux_index is not None:
            aux_logits = self.aux_head(features[self.aux_index])
        return Decoded(logits, aux_logits, {"backbone": features, "fpn": levels})
