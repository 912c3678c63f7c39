"""Repairs: what makes up for a cut, one a file."""
