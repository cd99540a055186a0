"""Backbones: timm's networks as feature pyramids, with the corrections that segmentation needs.

A backbone returns its feature maps as (B, C, H/s, W/s), fine to coarse.
"""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from timm.models.hrnet import HighResolutionModule
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mscs.errors import UsageError, unknown_name
from mscs.models.layers import resize
from mscs.models.pretrained import fetch_pretrained, require_all, tagged_name
from mscs.models.weights import read_state_dict

LONGEST_TEXT = 400  # of a message of timm's, which may name every tensor of a network


class Backbone(nn.Module):
    """A timm network that returns a list of feature maps, fine to coarse.

    Attributes:
        body: the timm network.
        family: `hrnet`, `swin` or `other`.
        channels: channels of each feature map.
        strides: stride of each feature map relative to the image.
    """

    family = "other"

    def __init__(self, body: Any, channels: list[int], strides: list[int]) -> None:
        super().__init__()
        self.body: Any = body
        self.channels = tuple(channels)
        self.strides = tuple(strides)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of `images` (B, 3, H, W)."""
        features = self.body(images)[-len(self.channels) :]
        if getattr(self.body, "output_fmt", "NCHW") == "NHWC":
            features = [x.permute(0, 3, 1, 2).contiguous() for x in features]
        return list(features)

    def checkpointed_blocks(self) -> Iterator[nn.Module]:
        """Yield the modules to recompute in the backward pass when memory is short."""
        for name in self.body.feature_info.module_name()[-len(self.channels) :]:
            stage = self.body.get_submodule(name)
            blocks = getattr(stage, "blocks", stage)
            if isinstance(blocks, nn.Sequential):
                yield from blocks
            else:
                yield stage


class BilinearFusion(HighResolutionModule):
    """HRNet's exchange between branches, upsampling bilinearly to the size of the target branch.

    timm upsamples by nearest neighbour and by a fixed factor, which changes the result and refuses images
    whose sides are not multiples of 32.
    """

    align_corners: bool

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Return the fused branches, fine to coarse."""
        branches = [branch(y) for branch, y in zip(self.branches, x, strict=True)]
        fused = []
        for i, row in enumerate(self.fuse_layers):
            size = branches[i].shape[-2:]
            terms = [resize(f(y), size, self.align_corners) for f, y in zip(row, branches, strict=True)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            fused.append(self.fuse_act(total))
        return fused


class HRNetBackbone(Backbone):
    """The four branches of HRNet's last stage, at strides 4 to 32."""

    family = "hrnet"

    def __init__(self, body: Any, channels: list[int], strides: list[int], align_corners: bool) -> None:
        super().__init__(body, channels, strides)
        for module in body.modules():
            if isinstance(module, HighResolutionModule):
                module.__class__ = BilinearFusion
                module.align_corners = align_corners
                for row in module.fuse_layers:
                    for j, path in enumerate(row):
                        if isinstance(path, nn.Sequential) and isinstance(path[-1], nn.Upsample):
                            row[j] = path[:-1]

    def checkpointed_blocks(self) -> Iterator[nn.Module]:
        """Yield the first layer and every exchange module."""
        yield self.body.layer1
        yield from (module for module in self.body.modules() if isinstance(module, BilinearFusion))


class PadThenShiftBlock(SwinTransformerBlock):
    """Swin block that pads to whole windows before the cyclic shift, as the original does.

    timm shifts first, so that in a padded map tokens of opposite borders meet in one window.
    """

    def _attn(self, x: Tensor) -> Tensor:
        _, height, width, channels = x.shape
        window_h, window_w = self.window_size
        shift_h, shift_w = self.shift_size
        x = F.pad(x, (0, 0, 0, -width % window_w, 0, -height % window_h))
        padded_h, padded_w = x.shape[1:3]
        shifted = shift_h > 0 or shift_w > 0
        mask = None
        if shifted:
            x = torch.roll(x, shifts=(-shift_h, -shift_w), dims=(1, 2))
            mask = self.get_attn_mask(x)
        windows = window_partition(x, self.window_size).view(-1, self.window_area, channels)
        windows = self.attn(windows, mask=mask).view(-1, window_h, window_w, channels)
        x = window_reverse(windows, self.window_size, padded_h, padded_w)
        if shifted:
            x = torch.roll(x, shifts=(shift_h, shift_w), dims=(1, 2))
        return x[:, :height, :width].contiguous()


class SwinBackbone(Backbone):
    """Swin's four stages, each with its own layer norm, for images of any size."""

    family = "swin"

    def __init__(self, body: Any) -> None:
        info = body.feature_info
        super().__init__(body, [stage["num_chs"] for stage in info], [stage["reduction"] for stage in info])
        for module in body.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = PadThenShiftBlock
        body.norm = body.head = nn.Identity()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the normalised output of each stage; images are padded with zeros to multiples of 4."""
        patch = self.strides[0]
        x = F.pad(images, (0, -images.shape[-1] % patch, 0, -images.shape[-2] % patch))
        x = self.body.patch_embed(x)
        features = []
        for stage, norm in zip(self.body.layers, self.norms, strict=True):
            x = stage(x)
            features.append(norm(x).permute(0, 3, 1, 2).contiguous())
        return features

    def checkpointed_blocks(self) -> Iterator[nn.Module]:
        """Yield every transformer block."""
        yield from (module for module in self.body.modules() if isinstance(module, SwinTransformerBlock))


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    # Recomputing a block would update the running statistics of its batch norms a second time.
    norms: list[Any] = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _frozen_statistics(block) if block.training else nullcontext()


def _enable_checkpointing(backbone: Backbone) -> None:
    for block in backbone.checkpointed_blocks():
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, context_fn=partial(_contexts, block)
        )


def build_backbone(
    name: str,
    *,
    pretrained: bool | str | Path = False,
    output_stride: int = 32,
    drop_path_rate: float | None = None,
    checkpointing: bool = False,
    backbone_options: Mapping[str, Any] | None = None,
    fuse_align_corners: bool = False,
) -> Backbone:
    """Return the timm network `name` (with or without a weight tag) as a feature pyramid.

    Args:
        name: such as `hrnet_w48` or `swin_base_patch4_window7_224.ms_in22k`.
        pretrained: False, True (the pinned weights) or the path of a weight file.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated. HRNet and Swin have 32 only.
        drop_path_rate: probability of dropping the last block's branch, rising linearly over the blocks;
            None means 0.3 for Swin and 0 for others.
        checkpointing: recompute blocks in the backward pass; batch-norm statistics are updated once.
        backbone_options: passed to timm.
        fuse_align_corners: upsampling inside HRNet.

    Raises:
        UsageError: unknown name or tag, or a network that cannot do what is asked.
    """
    architecture = _architecture(name)
    if drop_path_rate is not None and not 0 <= drop_path_rate < 1:
        raise UsageError(f"drop_path_rate must be in [0, 1), found {drop_path_rate}")
    options = dict(backbone_options or {})
    weights = None
    if pretrained is True:
        name = tagged_name(name)
        pretrained = fetch_pretrained(name)
    if pretrained is not False:
        weights = read_state_dict(pretrained)
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(weights)}}
    backbone: Backbone
    try:
        if architecture.startswith("hrnet"):
            backbone = _build_hrnet(name, drop_path_rate, output_stride, options, fuse_align_corners)
        elif architecture.startswith("swin_"):
            backbone = _build_swin(name, drop_path_rate, output_stride, options)
        else:
            backbone = _build_other(name, drop_path_rate, output_stride, options)
    except (RuntimeError, TypeError, LookupError, NotImplementedError, AssertionError) as error:
        options.pop("pretrained_cfg_overlay", None)
        text = " ".join(str(error).split())[:LONGEST_TEXT]
        raise UsageError(f"timm cannot make a feature pyramid of {name!r} with {options}: {text}") from error
    if weights is not None:
        require_all(backbone.body, weights)
    if checkpointing:
        _enable_checkpointing(backbone)
    return backbone


def _architecture(name: str) -> str:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=6)
        raise UsageError(
            f"unknown backbone {name!r}; it must be a name from timm.list_models()"
            + (f", such as {', '.join(near)}" if near else "")
        )
    tags = get_arch_pretrained_cfgs(architecture)
    if tag and name not in tags:
        raise UsageError(unknown_name(f"weight tag of backbone {architecture!r}", name, tags))
    return architecture


def _only_stride_32(name: str, output_stride: int) -> None:
    if output_stride != 32:
        raise UsageError(f"backbone {name!r} has output stride 32 only, found output_stride={output_stride}")


def _build_hrnet(
    name: str, drop_path_rate: float | None, output_stride: int, options: dict[str, Any], align_corners: bool
) -> HRNetBackbone:
    _only_stride_32(name, output_stride)
    if drop_path_rate:
        raise UsageError(f"backbone {name!r} has no drop path, found drop_path_rate={drop_path_rate}")
    body = timm.create_model(
        name, features_only=True, feature_location="", out_indices=(1, 2, 3, 4), **options
    )
    info = body.feature_info
    return HRNetBackbone(body, info.channels(), info.reduction(), align_corners)


def _build_swin(
    name: str, drop_path_rate: float | None, output_stride: int, options: dict[str, Any]
) -> SwinBackbone:
    _only_stride_32(name, output_stride)
    options = {
        "drop_path_rate": 0.3 if drop_path_rate is None else drop_path_rate,
        "strict_img_size": False,
        "always_partition": True,  # timm would drop the shift where a 224-pixel image fits in one window
        "num_classes": 0,
        **options,
    }
    return SwinBackbone(timm.create_model(name, **options))


def _build_other(
    name: str, drop_path_rate: float | None, output_stride: int, options: dict[str, Any]
) -> Backbone:
    if drop_path_rate:
        options["drop_path_rate"] = drop_path_rate
    if output_stride != 32:
        options["output_stride"] = output_stride
    body = timm.create_model(name, features_only=True, **options)
    info = body.feature_info
    channels, strides = info.channels()[-4:], info.reduction()[-4:]
    if len(strides) < 4 or strides[0] != 4 or strides[-1] != output_stride:
        raise UsageError(
            f"backbone {name!r} gives features at strides {strides}; the models need four maps, "
            f"from stride 4 to stride {output_stride}"
        )
    return Backbone(body, channels, strides)
