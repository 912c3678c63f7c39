"""The main job: rounding against GPTQ, where damage is measured, five budgets, and the job itself.

Models are taken off their 4-bit grid first. Perplexity and KL are on WikiText-2 test, context 2048, the first 16
windows; calibration is on WikiText-2 train. Results are in `results/main.json`, the page is docs/benchmarks.md.
"""

EXPERIMENTS = ("budgets", "rounding", "predicted", "background", "job")  # in the order in which they are run
ALONE = ()  # those that are run only where they are named
