"""Scores of predicted label maps, from pixel counts to confidence intervals, in NumPy."""
