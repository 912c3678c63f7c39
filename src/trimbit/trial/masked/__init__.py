"""The frozen model with two formats in every linear layer of its blocks, of which masks choose for each input channel.

`error_model` of a search says what stands for a format while masks are tried: a rounding (`rounded.py`), or the error
that is expected of it (`expected.py`).
"""
