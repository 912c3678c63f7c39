"""Runs the original model, one block at a time or whole.

Takes a `Checkpoint` and tokens; gives hidden states and logits.
"""
