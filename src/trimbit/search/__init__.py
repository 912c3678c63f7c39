"""From a problem to a plan.

Takes a layout, a budget, a space and an oracle of damage; gives the best plan found.
"""
