"""Packing, and every kernel beside its slow twin."""
