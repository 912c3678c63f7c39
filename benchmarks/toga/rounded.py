"""What KL does a search see for diag H's masks if both versions of each weight are rounded to nearest?

Cells: three settings. About 3 minutes per cell. Alone: `python benchmarks/run.py toga.rounded --data DATA`
"""

from collections.abc import Iterator
from functools import partial

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from toga.compressed import files, opened
from toga.masks import diag_h, ready
from toga.methods import SETTINGS, WITH_ALL

SEEDS = (0,)
SHARED_MINUTES = 10.0
ROUNDED = ("search.error_model=rtn", "search.dense=true")


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each setting."""
    for setting in WITH_ALL:
        yield Cell(
            key=seeded(f"rounded/{setting}", seed), run=partial(seen, bench, setting, seed), minutes=3, seed=seed,
            texts=files(bench, ()),
        )  # fmt: skip


def seen(bench: Bench, setting: str, seed: int) -> Found:
    """KL on the rows by which plans are chosen."""
    with ready(opened(bench, SETTINGS[setting][1], ROUNDED, seed)) as own:
        return {"kl": own.masked.damage(diag_h(own)[1]).kl}
