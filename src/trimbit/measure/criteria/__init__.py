"""How channels, heads and layers are scored; a file a criterion.

Takes a weight with moments or gradients; gives a score for each member of a dim, higher means keep.
"""
