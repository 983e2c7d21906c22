"""Masks drawn as polygons or run lengths in JSON files."""
