"""Data that is stored in files: plans, recipes, budgets, measurements, evaluations. Strict and frozen; no torch.

Takes parsed JSON or YAML; gives checked values, or an error that names the key.
"""
