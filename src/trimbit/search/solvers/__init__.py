"""Optimisers that know no models: knapsack, Bayesian optimisation, Pareto sets.

Takes numbers; gives choices.
"""
