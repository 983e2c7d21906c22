"""Prediction of label maps with a trained network."""
