"""What is known of the original model: its family, structure, bytes, files, and how to run it block by block.

Takes a config or a path; gives a `Layout`, a `Checkpoint`, a `BlockStream`.
"""
