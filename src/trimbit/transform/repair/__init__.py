"""Repairs after a cut or a rounding, one per file.

Takes a weight, its cut or quantised form, and moments; gives a better weight, a bias or a low-rank pair.
"""
