"""How long work is kept: content-keyed caches, journals, states of training, processes, progress.

Takes functions and keys; gives their results, made once. Knows no models.
"""
