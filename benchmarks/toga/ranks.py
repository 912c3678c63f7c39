"""Which rank does the prediction of channels from later ones need, for the expected errors to be right?

Cells: the KL of diag H's masks at W2A16, by rank. About 2 minutes per cell, 5 at full rank.
Alone: `python benchmarks/run.py toga.ranks --data DATA`
"""

from collections.abc import Iterator
from functools import partial

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results, table
from toga.compressed import files, opened
from toga.masks import diag_h, ready
from toga.methods import SETTINGS

SEEDS = (0,)
SHARED_MINUTES = 10.0
RANKS = (0, 1, 4, 16, 64, 1536)  # the last one is full rank
RECIPE = SETTINGS["W2A16"][1]


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each rank."""
    for rank in RANKS:
        yield Cell(
            key=seeded(f"ranks/{rank}", seed), run=partial(of_rank, bench, rank, seed),
            minutes=5 if rank == RANKS[-1] else 2, seed=seed, texts=files(bench, ()),
        )  # fmt: skip


def of_rank(bench: Bench, rank: int, seed: int) -> Found:
    """KL on the rows by which plans are chosen."""
    with ready(opened(bench, RECIPE, (f"search.residual_rank={rank}",), seed)) as own:
        return {"kl": own.masked.damage(diag_h(own)[1]).kl}


def rows(results: Results) -> list[str]:
    """A table of KL by rank."""
    found = [results.get(f"ranks/{rank}") for rank in RANKS]
    figures = ("not run" if one is None else f"{one['kl']:.3f}" for one in found)
    return table(["rank", *map(str, RANKS)], [["KL", *figures]])
