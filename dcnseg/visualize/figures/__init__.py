"""Figures of the offsets for one image, drawn with Matplotlib."""
