"""QPruner: whole recipes at three ratios, what decides bits, and how low-rank pairs start.

Model, calibration, perplexity and KL as for `main`. Recovery distils the original on instructions, 100 steps of 16 rows
of at most 256 tokens; tasks are the first 500 documents. Results are in `results/qpruner.json`, the page is
docs/results/qpruner.md.
"""

EXPERIMENTS = ("start", "recipes", "memory", "tasks", "plans", "ranks", "noise", "estimators")
ALONE = ()  # those that are run only where they are named
