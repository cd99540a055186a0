"""Backbones: timm's networks as feature pyramids, with the corrections that segmentation needs.

A backbone returns its feature maps as (B, C, H/s, W/s), fine to coarse.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.hrnet import HighResolutionModule
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mscs.errors import UsageError, unknown_name
from mscs.model_options import BackboneOptions
from mscs.models.layers import resize
from mscs.models.pretrained import fetch_pretrained, require_all, tagged_name
from mscs.models.weights import read_state_dict

LONGEST_TEXT = 400  # of a message of timm's, which may name every tensor of a network
DEFAULTS = BackboneOptions()
# timm tells which tensors of a classifier it does not load; `require_all` checks those that count
logging.getLogger("timm").addHandler(logging.NullHandler())


class Backbone(nn.Module):
    """A timm network that returns a list of feature maps, fine to coarse.

    Attributes:
        body: the timm network.
        family: `hrnet`, `swin` or `other`.
        channels: channels of each feature map.
        strides: stride of each feature map relative to the image.
    """

    family = "other"
    scale: Tensor
    shift: Tensor

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body: Any = body
        info = body.feature_info  # a list where the network was not made to return features, as Swin
        self.stages = (info if isinstance(info, list) else info.get_dicts())[-4:]
        self.channels = tuple(stage["num_chs"] for stage in self.stages)
        self.strides = tuple(stage["reduction"] for stage in self.stages)
        own = body.pretrained_cfg["mean"], body.pretrained_cfg["std"]
        self.renormalise = own != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        mean, std, imagenet_mean, imagenet_std = (
            torch.tensor(values)[:, None, None]
            for values in (*own, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        self.register_buffer("scale", imagenet_std / std, persistent=False)
        self.register_buffer("shift", (imagenet_mean - mean) / std, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of `images` (B, 3, H, W), normalised by ImageNet's mean and deviation."""
        if self.renormalise:  # a few of timm's networks were trained on images normalised in another way
            images = images * self.scale + self.shift
        features = self.body(images)[-len(self.channels) :]
        if getattr(self.body, "output_fmt", "NCHW") == "NHWC":
            features = [x.permute(0, 3, 1, 2).contiguous() for x in features]
        return list(features)

    def checkpointed_blocks(self) -> Iterator[nn.Module]:
        """Yield the modules to recompute in the backward pass when memory is short."""
        modules = dict(self.body.named_modules())
        for name in (stage["module"] for stage in self.stages):
            stage = modules[name] if name in modules else modules[name.replace(".", "_")]
            blocks = getattr(stage, "blocks", stage)
            yield from blocks if isinstance(blocks, nn.Sequential) else [stage]


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
            fused.append(self.fuse_act(reduce(add, terms)))
        return fused


class HRNetBackbone(Backbone):
    """The four branches of HRNet's last stage, at strides 4 to 32."""

    family = "hrnet"

    def __init__(self, body: Any, align_corners: bool) -> None:
        super().__init__(body)
        for name, module in list(body.named_modules()):
            if isinstance(module, HighResolutionModule):
                module.__class__ = BilinearFusion
                module.align_corners = align_corners
            elif isinstance(module, nn.Upsample):  # BilinearFusion resizes
                body.set_submodule(name, nn.Identity())

    def checkpointed_blocks(self) -> Iterator[nn.Module]:
        """Yield the first layer and every exchange module."""
        yield self.body.layer1
        yield from (module for module in self.body.modules() if isinstance(module, BilinearFusion))


class PadThenShiftBlock(SwinTransformerBlock):
    """Swin block that pads to whole windows before the cyclic shift, as the original does.

    timm shifts first, so that in a padded map tokens of opposite borders meet in one window.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window_h, window_w = self.window_size
        padded = F.pad(x, (0, 0, 0, -width % window_w, 0, -height % window_h))
        return super()._attn(padded)[:, :height, :width].contiguous()


class SwinBackbone(Backbone):
    """Swin's four stages, each with its own layer norm, for images of any size."""

    family = "swin"

    def __init__(self, body: Any) -> None:
        super().__init__(body)
        for module in body.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = PadThenShiftBlock
        body.patch_embed.dynamic_img_pad = True
        body.norm = body.head = nn.Identity()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the normalised output of each stage; images are padded with zeros to multiples of 4."""
        x = self.body.patch_embed(images)
        features = []
        for stage, norm in zip(self.body.layers, self.norms, strict=True):
            x = stage(x)
            features.append(norm(x).permute(0, 3, 1, 2).contiguous())
        return features


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    # Recomputing a block would update the running statistics of its batch norms a second time.
    norms: list[Any] = [
        m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros_like(norm.num_batches_tracked)
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _enable_checkpointing(backbone: Backbone) -> None:
    for block in backbone.checkpointed_blocks():
        contexts = partial(lambda block: (nullcontext(), _frozen_statistics(block)), block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def build_backbone(
    name: str, options: BackboneOptions = DEFAULTS, *, pretrained: bool | str | Path = False
) -> Backbone:
    """Return the timm network `name` (with or without a weight tag) as a feature pyramid.

    Args:
        name: such as `hrnet_w48` or `swin_base_patch4_window7_224.ms_in22k`.
        options: see `mscs.model_options.BackboneOptions`.
        pretrained: False, True (the pinned weights) or the path of a weight file.

    Raises:
        UsageError: unknown name or tag, or a network that cannot do what is asked.
    """
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise UsageError(unknown_name("backbone", name, timm.list_models()))
    if pretrained is True or name != architecture:
        name = tagged_name(name)
    family = next((f for f in ("hrnet", "swin") if architecture.startswith(f"{f}_")), "other")
    stride = options.output_stride or (32 if family == "hrnet" else 8)
    arguments = {**_timm_arguments(name, family, stride, options.drop_path_rate), **options.backbone_options}
    weights = None
    if pretrained is True:
        pretrained = fetch_pretrained(name)
    if pretrained is not False:
        weights = read_state_dict(pretrained)
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(weights)}}
    backbone: Backbone
    try:
        body = timm.create_model(name, **arguments)
        if family == "hrnet":
            backbone = HRNetBackbone(body, options.fuse_align_corners)
        else:
            backbone = SwinBackbone(body) if family == "swin" else Backbone(body)
    except (RuntimeError, TypeError, LookupError, NotImplementedError, AssertionError) as error:
        arguments.pop("pretrained_cfg_overlay", None)
        text = " ".join(str(error).split())[:LONGEST_TEXT]
        raise UsageError(
            f"timm cannot make a feature pyramid of {name!r} with {arguments}: {text}"
        ) from error
    strides = backbone.strides
    if len(strides) < 4 or strides[0] != 4 or strides[-1] != stride:
        raise UsageError(
            f"backbone {name!r} gives features at strides {list(strides)}; the models need four maps, "
            f"from stride 4 to stride {stride}, which is set by output_stride"
        )
    if weights is not None:
        require_all(backbone.body, weights)
    if options.checkpointing:
        _enable_checkpointing(backbone)
    return backbone


def _timm_arguments(name: str, family: str, stride: int, drop_path_rate: float | None) -> dict[str, Any]:
    if drop_path_rate is not None and not 0 <= drop_path_rate < 1:
        raise UsageError(f"drop_path_rate must be in [0, 1), found {drop_path_rate}")
    if family == "swin":
        return {
            "drop_path_rate": 0.3 if drop_path_rate is None else drop_path_rate,
            "strict_img_size": False,
            "always_partition": True,  # timm would drop the shift where a 224-pixel image fits in one window
            "num_classes": 0,
        }
    if family == "hrnet":
        if drop_path_rate:
            raise UsageError(f"backbone {name!r} has no drop path, found drop_path_rate={drop_path_rate}")
        return {"features_only": True, "feature_location": "", "out_indices": (1, 2, 3, 4)}
    return {  # timm leaves out what is None
        "features_only": True,
        "drop_path_rate": drop_path_rate or None,
        "output_stride": None if stride == 32 else stride,
    }
