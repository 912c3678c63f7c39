"""Optimisers that know nothing of models: knapsack, Bayesian optimisation, Pareto sets.

Takes numbers; gives choices.
"""
