"""The compressed directory.

Takes packed tensors and a plan; gives config.json, weight files, plan.json and the model card, whole or not at all.
"""
