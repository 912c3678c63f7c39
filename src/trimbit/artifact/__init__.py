"""Writes the compressed directory.

Takes packed tensors and a plan; gives config.json, weight files, plan.json and the model card, all of them or none.
"""
