"""Data that crosses a file boundary: plans, recipes, budgets, measurements, evaluations. Strict and frozen; no torch.

Takes JSON or YAML that was parsed; gives checked values, or an error that names the key.
"""
