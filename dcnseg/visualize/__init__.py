"""Figures of the offsets of a network."""
