"""Quantisers: one a file, tensors in, tensors out."""
