"""Checks a data set: contents, errors and warnings."""
