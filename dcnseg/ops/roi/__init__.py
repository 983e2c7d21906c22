"""Pooling of regions of interest."""
