"""Storage and operators of packed data, each fast one beside a slow twin.

Takes codes, scales and runs; gives values, or packs values into codes.
"""
