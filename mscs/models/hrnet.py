"""HRNet's segmentation head: all branches at the finest stride, concatenated, two convolutions."""

from torch import Tensor

from mscs.model_options import HRNetOptions
from mscs.models.backbone import Backbone
from mscs.models.base import Decoded, SegmentationModel
from mscs.models.layers import FCNHead, concatenate


class HRNet(SegmentationModel):
    """Head of HRNetV2 (Wang et al., 2020) as the authors changed it: 3x3 convolution, no ReLU.

    Projector positions: `backbone` (one per branch) and `concat` (one on the concatenation at stride 4,
    the one-scale case of the paper's Table 2a). Options: see `mscs.model_options.HRNetOptions`.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, projector: str | None, options: HRNetOptions
    ) -> None:
        super().__init__(backbone, options)
        total = sum(backbone.channels)
        self.head = FCNHead(
            total,
            options.head_channels or total,
            num_classes,
            kernel=options.head_kernel,
            relu=options.head_relu,
            classifier_bias=options.head_bias,
        )
        self.add_projectors(projector, {"backbone": backbone.channels, "concat": [total]})

    def decode(self, features: list[Tensor]) -> Decoded:
        """Return logits at the finest stride."""
        joined = concatenate(features, self.align_corners)
        return Decoded(self.head(joined), None, {"backbone": features, "concat": [joined]})
