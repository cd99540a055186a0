"""The options of each model with their defaults, in plain Python: reading a configuration needs no torch.

The defaults are those of the paper's own networks; params.yaml holds where other recipes differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """What every backbone takes.

    Attributes:
        output_stride: 8, 16 or 32; below 32 the last stages are dilated. HRNet and Swin have 32 only. None
            means 32 for HRNet, which keeps a branch at stride 4, and 8 for others.
        drop_path_rate: probability in [0, 1) of dropping the last block's branch, rising linearly over the
            blocks; None means 0.3 for Swin and 0 for others.
        checkpointing: recompute blocks in the backward pass; batch-norm statistics are updated once.
        backbone_options: passed to timm.create_model, such as embed_dim, depths, window_size.
        fuse_align_corners: of the upsampling inside HRNet.
    """

    output_stride: int | None = 32
    drop_path_rate: float | None = None
    checkpointing: bool = False
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    fuse_align_corners: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BackboneOptions):
    """What every model takes."""

    align_corners: bool = True  # of all upsampling in the head
    projector_channels: int = 256  # of an embedding


@dataclass(frozen=True, kw_only=True)
class HRNetOptions(ModelOptions):
    """Options of `hrnet`."""

    head_channels: int | None = None  # None: as many as the concatenated features have
    head_kernel: int = 3
    head_relu: bool = False
    head_bias: bool = False  # of the classifier


@dataclass(frozen=True, kw_only=True)
class OCRNetOptions(ModelOptions):
    """Options of `ocrnet`."""

    output_stride: int | None = None
    mid_channels: int = 512
    key_channels: int = 256
    aux_channels: int | None = None  # None: mid_channels
    aux_kernel: int = 3
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DeepLabV3Options(ModelOptions):
    """Options of `deeplabv3`."""

    output_stride: int | None = 8
    aspp_channels: int = 256
    aspp_rates: tuple[int, ...] = (12, 24, 36)
    aspp_bn_eps: float = 3e-4  # torch's default is 1e-5


@dataclass(frozen=True, kw_only=True)
class UPerNetOptions(ModelOptions):
    """Options of `upernet`."""

    align_corners: bool = False
    channels: int = 512
    pool_sizes: tuple[int, ...] = (1, 2, 3, 6)
    ppm_upsample_first: bool = True  # pool, upsample, convolve; False: pool, convolve, upsample
    dropout: float = 0.1
    # stage that feeds the auxiliary head; auto: 2 for Swin, else no head
    aux_index: int | str | None = "auto"
    aux_channels: int = 256


MODEL_OPTIONS: dict[str, ModelOptions] = {
    "hrnet": HRNetOptions(),
    "ocrnet": OCRNetOptions(),
    "deeplabv3": DeepLabV3Options(),
    "upernet": UPerNetOptions(),
}
"""By the name of the model; `vars` gives names and defaults."""
