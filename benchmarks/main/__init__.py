"""The main job: rounding against GPTQ, how damage is measured or predicted, five budgets, texts, and the whole job.

Models are first taken off their 4-bit grid. Perplexity and KL are those of the first 16 windows of WikiText-2 test at
context 2048; calibration is on WikiText-2 train. Results are in `results/main.json`, the page is docs/benchmarks.md.
"""

EXPERIMENTS = ("budgets", "rounding", "predicted", "plans", "spread", "texts", "job")  # in the order of running
ALONE = ("scale",)  # run only if named
