"""Searches over the input channels of every site: each is in a low or a high format.

Takes a `Problem`; gives runs and orders of channels, or masks to learn.
"""
