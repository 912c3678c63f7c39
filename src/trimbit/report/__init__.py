"""Tables and pictures of what was decided.

Takes plans and results; gives rows, CSV and PNG.
"""
