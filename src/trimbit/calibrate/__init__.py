"""Text, and what the dense model says of it.

Takes a file or the model itself; gives tokens, second moments of every site's inputs, gradients, the teacher's outputs.
"""
