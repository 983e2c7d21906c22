"""Pooling of regions of interest (RoIs)."""
