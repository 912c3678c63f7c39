"""The frozen model with two formats in every linear layer of its blocks; masks choose one for each input channel.

`error_model` of a search says how a format is simulated while masks are tried: by rounding (`rounded.py`), or by its
expected error (`expected.py`).
"""
