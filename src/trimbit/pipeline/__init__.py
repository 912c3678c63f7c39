"""A job from model to directory.

Takes a model, a recipe, a text and a budget; runs the stages of the flow, which are cached, and gives
a compressed directory.
"""
