"""What a job will take, before it runs.

Takes a job and a budget; gives seconds and peak memory by stage, from pieces that are timed on the opened model.
"""
