"""Reads original models tensor by tensor.

Takes a path to safetensors or GGUF; gives a `Checkpoint`.
"""
