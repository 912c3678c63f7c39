"""The time and memory of a job, estimated before it runs.

Takes a job and a budget; gives seconds and peak memory by stage, from pieces that are timed on the opened model.
"""
