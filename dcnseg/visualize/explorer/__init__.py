"""A page to explore the offsets of an image."""
