"""From a plan and a checkpoint to packed tensors, block by block.

Takes a plan, weights and tokens; gives the tensors of the compressed model.
"""
