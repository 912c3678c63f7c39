"""TOGA-q: learnt precision masks compared with channels chosen in other ways, and with other methods.

The off-grid model is that of seed 0; the seed of a cell is for text and masks. All methods see the same text of
WikiText-2 train: 16 rows of 2,048 tokens for second moments and GPTQ, and 150 more for masks. Perplexity and KL are at
context 2048, on the first 16 windows of WikiText-2 test and of C4. Masks are learnt in 600 steps of 512 tokens, except
in 100 for `options`, W3A16 and W4A4. `full`, with 2,000 steps as in the paper, of 2,048 tokens each, is for a GPU and
runs only if named; `errors`, `noise` and `gptq` are for a CPU. Results are in `results/toga.json`, the page is
docs/results/toga-q.md.
"""

EXPERIMENTS = (
    "settings", "tiles", "ranks", "noise", "gptq", "rounded", "kv", "options", "errors", "agreement", "cost",
)  # fmt: skip
ALONE = ("full",)  # run only if named
