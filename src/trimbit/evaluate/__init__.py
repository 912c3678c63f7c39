"""Measures a model, original or compressed.

Takes a path and a text or tasks; gives perplexity, KL, accuracy, bytes, memory and speed.
"""
