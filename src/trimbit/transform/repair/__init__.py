"""What makes up for a cut or a rounding; a file each.

Takes a weight, what became of it, and moments; gives a better weight, a bias or a low-rank pair.
"""
