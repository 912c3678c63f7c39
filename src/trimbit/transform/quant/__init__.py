"""Quantisers; a file each.

Takes weights, moments and runs; gives `QTensor`s in exactly these runs.
"""
