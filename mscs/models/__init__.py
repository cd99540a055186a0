"""The paper's four architectures on timm backbones: `build_model` and what goes with it."""

from mscs.models.base import ModelOutput, SegmentationModel
from mscs.models.build import build_model, count_parameters
from mscs.models.convert import load_official, load_upstream
from mscs.models.pretrained import fetch_pretrained
from mscs.models.sync_batchnorm import convert_sync_batchnorm
from mscs.models.weights import read_state_dict

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
