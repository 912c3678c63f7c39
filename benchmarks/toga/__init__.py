"""TOGA-q: learnt masks of precision beside channels chosen otherwise, and beside other methods.

The model off its grid is that of seed 0; the seed of a cell is that of text and masks. All methods see the same text of
WikiText-2 train: 16 rows of 2,048 tokens for second moments and GPTQ, 150 further rows for masks. Perplexity and KL are
at context 2048, on the first 16 windows of WikiText-2 test and of C4. Masks are learnt in 600 steps of 512 tokens,
those of `options`, of W3A16 and of W4A4 in 100. `full`, the paper's 2,000 steps of 2,048 tokens, is for a GPU, and is
run only where it is named; `errors`, `noise` and `gptq` are for a CPU. Results are in `results/toga.json`, the page is
docs/results/toga-q.md.
"""

EXPERIMENTS = (
    "settings", "tiles", "ranks", "noise", "gptq", "rounded", "kv", "options", "errors", "agreement", "cost",
)  # fmt: skip
ALONE = ("full",)  # those that are run only where they are named
