"""Search methods, found by file name.

Takes a `Problem` and a config; gives a plan within the budget.
"""
