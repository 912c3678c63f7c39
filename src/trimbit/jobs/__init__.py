"""Running and keeping long work: caches by content key, journals, training states, processes, progress.

Takes functions and keys; gives their results, computed only once. Independent of models.
"""
