"""Checkpoints of other code bases: their names of tensors, in ours."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mscs.errors import UsageError
from mscs.models.base import SegmentationModel
from mscs.models.weights import load_strictly, unwrap

Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]


def _next_stage(match: re.Match[str]) -> str:
    # Others downsample at the end of a Swin stage, timm at the start of the next.
    return f"backbone.body.layers.{int(match[1]) + 1}.downsample."


_SWIN: Rules = [
    (r"^backbone\.layers\.(\d+)\.downsample\.", _next_stage),
    (r"^backbone\.norm(\d+)\.", r"backbone.norms.\1."),
]
_BACKBONE: Rules = [(r"^backbone\.(?!body\.|norms\.)", "backbone.body.")]

# The authors' repository, one list per model.
_OFFICIAL_PROJECTORS: Rules = [
    (r"^projector_model\.project(\d+)\.", r"projectors.\1."),
    (r"^projector_model\.project\.", "projectors.0."),
]
_OFFICIAL_AUX: Rules = [
    (r"^(?:aux_head|interm_prediction_head)\.0\.", "aux_head.conv."),
    (r"^(?:aux_head|interm_prediction_head)\.1\.", "aux_head.norm."),
    (r"^(?:aux_head|interm_prediction_head)\.4\.", "aux_head.classifier."),
]
OFFICIAL: dict[str, Rules] = {
    "HRNet": [
        (r"^cls_head\.0\.", "head.conv."),
        (r"^cls_head\.1\.", "head.norm."),
        (r"^cls_head\.2\.", "head.classifier."),
    ],
    "OCRNet": [
        (r"^conv_high_map\.", "pixels."),
        (r"^spatial_ocr_head\.object_context_block\.f_pixel\.", "attention.query."),
        (r"^spatial_ocr_head\.object_context_block\.f_object\.", "attention.key."),
        (r"^spatial_ocr_head\.object_context_block\.f_down\.", "attention.value."),
        (r"^spatial_ocr_head\.object_context_block\.f_up\.", "attention.out."),
        (r"^spatial_ocr_head\.conv_bn_dropout\.", "attention.fuse."),
        (r"^conv_out\.", "classifier."),
    ],
    "DeepLabV3": [
        (r"^aspp\.aspp5\.", "aspp.mean.0."),
        (r"^aspp\.aspp5_bn\.", "aspp.mean.1."),
        (r"^aspp\.aspp(\d)\.", lambda m: f"aspp.paths.{int(m[1]) - 1}.0."),
        (r"^aspp\.aspp(\d)_bn\.", lambda m: f"aspp.paths.{int(m[1]) - 1}.1."),
        (r"^aspp\.conv2\.", "aspp.fuse.0."),
        (r"^aspp\.bn2\.", "aspp.fuse.1."),
        (r"^conv_out\.", "classifier."),
    ],
    "UPerNet": [
        (r"^fpn\.ppm_conv\.", "ppm.convs."),
        (r"^fpn\.ppm_last_conv\.", "ppm.fuse."),
        (r"^fpn\.fpn_in\.", "lateral."),
        (r"^fpn\.fpn_out\.(\d+)\.0\.", r"smooth.\1."),
        (r"^fpn\.conv_last\.0\.", "fuse."),
        (r"^fpn\.conv_last\.2\.", "classifier."),
    ],
}

# HRNet-Semantic-Segmentation (HRNet, OCRNet) and mmsegmentation 0.x (UPerNet).
_HRNET_BODY: Rules = [(r"^(conv[12]|bn[12]|layer1|transition\d|stage\d)\.", r"backbone.body.\1.")]
UPSTREAM: dict[str, Rules] = {
    "HRNet": [
        *_HRNET_BODY,
        (r"^last_layer\.0\.", "head.conv."),
        (r"^last_layer\.1\.", "head.norm."),
        (r"^last_layer\.3\.", "head.classifier."),
    ],
    "OCRNet": [
        *_HRNET_BODY,
        (r"^aux_head\.0\.", "aux_head.conv."),
        (r"^aux_head\.1\.", "aux_head.norm."),
        (r"^aux_head\.3\.", "aux_head.classifier."),
        (r"^conv3x3_ocr\.", "pixels."),
        (r"^cls_head\.", "classifier."),
        (r"^ocr_distri_head\.object_context_block\.f_pixel\.", "attention.query."),
        (r"^ocr_distri_head\.object_context_block\.f_object\.", "attention.key."),
        (r"^ocr_distri_head\.object_context_block\.f_down\.", "attention.value."),
        (r"^ocr_distri_head\.object_context_block\.f_up\.", "attention.out."),
        (r"^ocr_distri_head\.conv_bn_dropout\.", "attention.fuse."),
        (r"^(attention\.(?:query|key))\.2\.", r"\1.3."),
        (r"^(attention\.(?:query|key))\.3\.0\.", r"\1.4."),
        (r"^(attention\.\w+)\.1\.0\.", r"\1.1."),
    ],
    "UPerNet": [
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
    ],
}


def load_official(model: SegmentationModel, state_dict: Mapping[str, object]) -> None:
    """Load a checkpoint of the paper's own code into `model`, strictly.

    Raises:
        UsageError: a tensor is missing, unexpected or of another shape; the message lists the names.
    """
    tensors = _renamed(unwrap(state_dict), [*_OFFICIAL_AUX, *_OFFICIAL_PROJECTORS], OFFICIAL, model)
    if type(model).__name__ == "UPerNet" and "fuse.0.weight" in tensors:
        # their code concatenates the pyramid as P2, P5, P4, P3; ours goes from fine to coarse
        first, *rest = tensors["fuse.0.weight"].chunk(len(model.backbone.channels), dim=1)
        tensors["fuse.0.weight"] = torch.cat([first, *reversed(rest)], dim=1)
    load_strictly(model, tensors)


def load_upstream(model: SegmentationModel, state_dict: Mapping[str, object]) -> None:
    """Load a checkpoint of the repository that the architecture comes from, strictly.

    HRNet and OCRNet: HRNet-Semantic-Segmentation. UPerNet on Swin: Swin-Transformer-Semantic-Segmentation
    (mmsegmentation 0.x). The model computes the same function only if it was built with
    `mscs.models.options.UPSTREAM_OPTIONS`.

    Raises:
        UsageError: a tensor is missing, unexpected or of another shape; the message lists the names.
    """
    tensors = _renamed(unwrap(state_dict), [], UPSTREAM, model)
    norm, bias = "aux_head.norm.bias", "aux_head.conv.bias"
    if type(model).__name__ == "UPerNet" and norm in tensors:
        # mmsegmentation's convolution has no bias; batch norm makes any constant one harmless
        tensors.setdefault(bias, torch.zeros_like(tensors[norm]))
    load_strictly(model, tensors)


def _renamed(
    tensors: dict[str, Tensor], first: Rules, tables: Mapping[str, Rules], model: SegmentationModel
) -> dict[str, Tensor]:
    kind = type(model).__name__
    if kind not in tables:
        raise UsageError(f"no table of names for {kind}; known: {', '.join(tables)}")
    rules = [*first, *tables[kind], *(_SWIN if model.backbone.family == "swin" else []), *_BACKBONE]
    renamed = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor
    return renamed
