"""Checkpoints of other code bases: their names of tensors, in ours."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mscs.models.base import SegmentationModel
from mscs.models.upernet import UPerNet
from mscs.models.weights import load_strictly, unwrap

# Patterns and their replacements, applied one after the other. No name has two meanings within a code base,
# so that one list serves all of its models.
Rules = list[tuple[str, str]]

OFFICIAL: Rules = [
    (r"^projector_model\.project\.", "projectors.0."),
    (r"^projector_model\.project(\d+)\.", r"projectors.\1."),
    (r"^interm_prediction_head\.", "aux_head."),
    (r"^cls_head\.", "head."),
    (r"^conv_high_map\.", "pixels."),
    (r"^aspp\.aspp5\.", "aspp.mean.0."),
    (r"^aspp\.aspp5_bn\.", "aspp.mean.1."),
    *((rf"^aspp\.aspp{i + 1}\.", f"aspp.paths.{i}.0.") for i in range(4)),
    *((rf"^aspp\.aspp{i + 1}_bn\.", f"aspp.paths.{i}.1.") for i in range(4)),
    (r"^aspp\.conv2\.", "aspp.fuse.0."),
    (r"^aspp\.bn2\.", "aspp.fuse.1."),
    (r"^conv_out\.", "classifier."),
    (r"^fpn\.ppm_conv\.", "ppm.convs."),
    (r"^fpn\.ppm_last_conv\.", "ppm.fuse."),
    (r"^fpn\.fpn_in\.", "lateral."),
    (r"^fpn\.fpn_out\.(\d+)\.0\.", r"smooth.\1."),
    (r"^fpn\.conv_last\.0\.", "fuse."),
    (r"^fpn\.conv_last\.2\.", "classifier."),
]
"""The authors' repository."""

UPSTREAM: Rules = [
    # HRNet-Semantic-Segmentation: HRNet, OCRNet
    (r"^(conv[12]|bn[12]|layer1|transition\d|stage\d)\.", r"backbone.body.\1."),
    (r"^last_layer\.", "head."),
    (r"^conv3x3_ocr\.", "pixels."),
    (r"^cls_head\.", "classifier."),
    # mmsegmentation 0.x: UPerNet
    (r"^decode_head\.conv_seg\.", "classifier."),
    (r"^auxiliary_head\.conv_seg\.", "aux_head.classifier."),
    (r"^auxiliary_head\.convs\.0\.conv\.", "aux_head.conv."),
    (r"^auxiliary_head\.convs\.0\.bn\.", "aux_head.norm."),
    (r"^decode_head\.psp_modules\.(\d+)\.1\.(\w+)\.", r"ppm.convs.\1.\2."),
    (r"^decode_head\.bottleneck\.", "ppm.fuse."),
    (r"^decode_head\.lateral_convs\.", "lateral."),
    (r"^decode_head\.fpn_convs\.", "smooth."),
    (r"^decode_head\.fpn_bottleneck\.", "fuse."),
    (r"^((?:ppm|lateral|smooth|fuse)\..*?)conv\.", r"\g<1>0."),
    (r"^((?:ppm|lateral|smooth|fuse)\..*?)bn\.", r"\g<1>1."),
]
"""The repositories that the architectures come from."""

SHARED: Rules = [
    (r"^((?:aux_)?head)\.0\.", r"\1.conv."),
    (r"^((?:aux_)?head)\.1\.", r"\1.norm."),
    (r"^((?:aux_)?head)\.[234]\.", r"\1.classifier."),
    # OCRNet; the last three concern HRNet-Semantic-Segmentation only, which puts norm and ReLU in one module
    (r"^(?:spatial_ocr_head|ocr_distri_head)\.(?:object_context_block\.)?", "attention."),
    (r"^attention\.f_pixel\.", "attention.query."),
    (r"^attention\.f_object\.", "attention.key."),
    (r"^attention\.f_down\.", "attention.value."),
    (r"^attention\.f_up\.", "attention.out."),
    (r"^attention\.conv_bn_dropout\.", "attention.fuse."),
    (r"^(attention\.(?:query|key))\.2\.", r"\1.3."),
    (r"^(attention\.(?:query|key))\.3\.0\.", r"\1.4."),
    (r"^(attention\.\w+)\.1\.0\.", r"\1.1."),
    # Swin; others downsample at the end of a stage, timm at the start of the next
    *((rf"^backbone\.layers\.{i}\.downsample", f"backbone.body.layers.{i + 1}.downsample") for i in range(3)),
    (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
    (r"^backbone\.(?!body\.|norms\.)", "backbone.body."),
]


def load_official(model: SegmentationModel, state_dict: Mapping[str, object]) -> None:
    """Load a checkpoint of the paper's own code into `model`, strictly.

    Raises:
        UsageError: a tensor is missing, unexpected or of another shape; the message lists the names.
    """
    tensors = _renamed(state_dict, OFFICIAL)
    if isinstance(model, UPerNet) and "fuse.0.weight" in tensors:
        # their code concatenates the pyramid as P2, P5, P4, P3; ours goes from fine to coarse
        first, *rest = tensors["fuse.0.weight"].chunk(len(model.backbone.channels), dim=1)
        tensors["fuse.0.weight"] = torch.cat([first, *reversed(rest)], dim=1)
    load_strictly(model, tensors)


def load_upstream(model: SegmentationModel, state_dict: Mapping[str, object]) -> None:
    """Load a checkpoint of the repository that the architecture comes from, strictly.

    HRNet and OCRNet: HRNet-Semantic-Segmentation. UPerNet on Swin: Swin-Transformer-Semantic-Segmentation
    (mmsegmentation 0.x). The model computes the same function only if it was built with the options of recipe
    `upstream` in params.yaml.

    Raises:
        UsageError: a tensor is missing, unexpected or of another shape; the message lists the names.
    """
    tensors = _renamed(state_dict, UPSTREAM)
    norm, bias = "aux_head.norm.bias", "aux_head.conv.bias"
    if isinstance(model, UPerNet) and norm in tensors:
        # mmsegmentation's convolution has no bias; batch norm makes any constant one harmless
        tensors.setdefault(bias, torch.zeros_like(tensors[norm]))
    load_strictly(model, tensors)


def _renamed(state_dict: Mapping[str, object], rules: Rules) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in unwrap(state_dict).items():
        for pattern, replacement in [*rules, *SHARED]:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed
