"""Training that recovers quality: low-rank pairs beside packed weights.

Takes a compressed directory and rows of text; gives trained pairs.
"""
