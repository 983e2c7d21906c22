"""Pairs images with masks and assigns them to splits."""
