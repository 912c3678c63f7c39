"""Training that recovers quality: low-rank pairs of packed weights.

Takes a compressed directory and rows of text; gives trained pairs.
"""
