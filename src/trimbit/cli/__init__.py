"""The command line.

Takes arguments; prints results on stdout, progress and errors on stderr.
"""
