"""Packed storage and its operators.

Takes codes, scales and runs; gives values, or packs values into codes.
"""
