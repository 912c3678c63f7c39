"""Calibration text, and statistics of the dense model on it.

Takes a text file or the model itself; gives tokens, second moments of each site's inputs, gradients, teacher outputs.
"""
