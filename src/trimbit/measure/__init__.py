"""What a channel, a layer or a choice is worth.

Takes statistics and a model in memory; gives rankings, layer importance and the damage of each choice.
"""
