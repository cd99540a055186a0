"""Multi-scale and cross-scale contrastive learning for semantic segmentation, reproducible."""

__version__ = "0.1.0"
