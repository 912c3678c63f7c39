"""Reads original models tensor by tensor.

Takes a path to a directory of safetensors or to a GGUF file; gives a `Checkpoint`.
"""
