"""Running long work and keeping its results: stages, the cache, journals, training states, processes, progress.

Takes functions and content keys; gives results, each computed only once. Independent of models.
"""
