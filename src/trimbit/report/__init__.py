"""Tables and pictures of plans and results.

Takes plans and results; gives rows, CSV and PNG.
"""
