"""QPruner: whole recipes at three pruning ratios, how bits are chosen, and how low-rank pairs are initialised.

Model, calibration, perplexity and KL are those of `main`. Recovery distils the original on instructions, in 100 steps
of 16 rows of at most 256 tokens; each task is scored on its first 500 documents. Results are in `results/qpruner.json`,
the page is docs/results/qpruner.md.
"""

EXPERIMENTS = ("start", "recipes", "memory", "tasks", "plans", "ranks", "noise", "estimators")
ALONE = ()  # run only if named
