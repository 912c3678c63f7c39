"""Run the original model, one block at a time or as a whole.

Takes a `Checkpoint` and tokens; gives hidden states and logits.
"""
