"""The original model: its family, structure, bytes and files, and running it block by block.

Takes a config or a path; gives a `Layout`, a `Checkpoint` or a `BlockStream`.
"""
