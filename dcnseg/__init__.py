"""Semantic segmentation with deformable convolutions."""

__version__ = "0.1.0"
