"""What matters in training masks: the loss, the network, the prior, the estimator or the error model?

Cells: W1.6A16 in 100 steps, each with one option changed. 10 to 15 minutes per cell.
Alone: `python benchmarks/run.py toga.options --data DATA`
"""

from collections.abc import Iterator
from functools import partial

from harness.bench import Bench
from harness.cells import Cell, seeded
from harness.records import held_out_kl
from harness.tables import Results, table
from toga.compressed import compressed, files
from toga.methods import SHORTER

SEEDS = (0,)
SHARED_MINUTES = 10.0
RECIPE = "toga-q-w1.6a16"
OPTIONS: dict[str, tuple[str, ...]] = {
    "as in the recipe": (),
    "loss of the next token": ("search.loss=lm",),
    "a logit for each channel, AdamW": ("search.network=logits", "search.learning_rate=0.05"),
    "a logit for each channel, along the gradient": (
        "search.network=logits", "search.optimizer=sgd", "search.learning_rate=25.0",
    ),
    "no prior": ("search.prior=0.0",),
    "Gumbel": ("search.estimator=gumbel", "search.temperature=0.4"),
    "errors of rank 0": ("search.residual_rank=0",),
    "rounded to nearest": ("search.error_model=rtn", "search.dense=true"),
    "GPTQ's versions": ("search.error_model=quantizer", "search.dense=true"),
}  # fmt: skip


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each option."""
    for option, overrides in OPTIONS.items():
        yield Cell(
            key=seeded(f"options/{option}", seed),
            run=partial(compressed, bench, RECIPE, (*SHORTER, *overrides), seed=seed, texts=()),
            minutes=13, seed=seed, texts=files(bench, ()),
        )  # fmt: skip


def rows(results: Results) -> list[str]:
    """A table of KL on the rows by which plans are chosen, as the search saw it and once packed."""
    found = []
    for name, key in {"diag H": "settings/W1.6A16/diag H", **{one: f"options/{one}" for one in OPTIONS}}.items():
        cell = results.get(key)
        seen = "" if cell is None or "kl_in_search" not in cell else f"{cell['kl_in_search']:.3f}"
        found.append([name, *(("not run", "") if cell is None else (seen, f"{held_out_kl(cell):.3f}"))])
    return table(["masks", "as the search sees it", "packed, GPTQ"], found)
