"""Quantisers, one per file.

Takes weights, moments and runs; gives `QTensor`s in exactly these runs.
"""
