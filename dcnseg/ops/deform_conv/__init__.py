"""The deformable convolution."""
