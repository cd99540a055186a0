"""The paper's four architectures on timm backbones: `build_model` and what goes with it.

Names are imported when they are first used, so that `mscs.models.options` can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mscs.models.base import ModelOutput, SegmentationModel
    from mscs.models.build import build_model, count_parameters
    from mscs.models.convert import load_official, load_upstream
    from mscs.models.pretrained import fetch_pretrained
    from mscs.models.sync_batchnorm import convert_sync_batchnorm
    from mscs.models.weights import read_state_dict

_HOMES = {
    "ModelOutput": "base",
    "SegmentationModel": "base",
    "build_model": "build",
    "convert_sync_batchnorm": "sync_batchnorm",
    "count_parameters": "build",
    "fetch_pretrained": "pretrained",
    "load_official": "convert",
    "load_upstream": "convert",
    "read_state_dict": "weights",
}

__all__ = [
    "ModelOutput",
    "SegmentationModel",
    "build_model",
    "convert_sync_batchnorm",
    "count_parameters",
    "fetch_pretrained",
    "load_official",
    "load_upstream",
    "read_state_dict",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
