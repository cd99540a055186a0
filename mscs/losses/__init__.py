"""Losses: the contrastive terms of the paper at any size and on any number of GPUs, and cross-entropy."""

from mscs.losses.contrastive import contrastive_loss
from mscs.losses.multiscale import LossTerms, MultiScaleContrastiveLoss
from mscs.losses.sampling import Anchors, sample_anchors
from mscs.losses.segmentation import segmentation_loss

__all__ = [
    "Anchors",
    "LossTerms",
    "MultiScaleContrastiveLoss",
    "contrastive_loss",
    "sample_anchors",
    "segmentation_loss",
]
