"""From a name to a model."""

from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import nn

from mscs.errors import UsageError, unknown_name
from mscs.model_options import MODEL_OPTIONS, ModelOptions
from mscs.models.backbone import build_backbone
from mscs.models.base import SegmentationModel
from mscs.models.deeplabv3 import DeepLabV3
from mscs.models.hrnet import HRNet
from mscs.models.ocrnet import OCRNet
from mscs.models.upernet import UPerNet

BUILDERS: dict[str, Callable[..., SegmentationModel]] = {
    "hrnet": HRNet,
    "ocrnet": OCRNet,
    "deeplabv3": DeepLabV3,
    "upernet": UPerNet,
}


def build_model(
    name: str | type[SegmentationModel],
    backbone: str,
    num_classes: int,
    *,
    projector: str | None = None,
    pretrained: bool | str | Path = False,
    **options: Any,
) -> SegmentationModel:
    """Return a model that maps images (B, 3, H, W) to a `ModelOutput`.

    Weights without a pretrained file are drawn from torch's default generator: seed it first.

    Args:
        name: `hrnet`, `ocrnet`, `deeplabv3` or `upernet`; or a class of your own, which may have an attribute
            `Options`: a dataclass of its options, derived from `ModelOptions`.
        backbone: a timm name, with or without a weight tag.
        num_classes: K, at least 2.
        projector: where embeddings branch off: `backbone`, `fpn` (UPerNet), `concat` (HRNet) or None.
        pretrained: False, True (download or find the pinned weights) or the path of a weight file.
        options: see `mscs.model_options`.

    Raises:
        UsageError: an unknown name or option, or a combination that does not exist.
    """
    if isinstance(name, str):
        if name not in BUILDERS:
            raise UsageError(unknown_name("model", name, BUILDERS))
        builder, defaults = BUILDERS[name], MODEL_OPTIONS[name]
    else:
        if not (isinstance(name, type) and issubclass(name, SegmentationModel)):
            raise UsageError(f"model {name!r} is no mscs.models.SegmentationModel")
        builder, defaults, name = name, getattr(name, "Options", ModelOptions)(), name.__name__
    for option in options:
        if option not in vars(defaults):
            raise UsageError(unknown_name(f"option of model {name!r}", option, vars(defaults)))
    if not isinstance(backbone, str):
        raise UsageError(f"backbone must be a name from timm.list_models(), found {backbone!r}")
    if not isinstance(num_classes, Integral) or num_classes < 2:
        raise UsageError(f"num_classes must be at least 2, a whole number; found {num_classes!r}")
    for option, value in options.items():
        whole = option.endswith("channels") and value is not None
        if whole and not (isinstance(value, Integral) and value > 0):
            raise UsageError(f"{option} must be a whole number of at least 1, found {value!r}")
    chosen = replace(defaults, **options)
    body = build_backbone(backbone, chosen, pretrained=pretrained)
    return builder(body, num_classes, projector, chosen)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters without those of projectors, which exist in training only."""
    return sum(p.numel() for name, p in model.named_parameters() if "projectors" not in name.split("."))
