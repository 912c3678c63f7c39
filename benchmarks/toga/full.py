"""How good are masks learnt at full length: the paper's 2,000 steps, of 2,048 tokens each?

Cells: three settings and `toga-q-faithful`, for three seeds. For a GPU, where masks take 4 minutes, and the rest 20
on two CPU cores; without a GPU, a day. Runs only if named: `python benchmarks/run.py toga.full --data DATA --seeds 0`
"""

from collections.abc import Iterator
from functools import partial

from harness.bench import Bench
from harness.cells import Cell
from harness.tables import Results
from toga.compressed import compressed, files, texts_table
from toga.methods import SETTINGS, WITH_ALL

SEEDS = (0, 1, 2)
SHARED_MINUTES = 10.0
FULL = ("search.steps=2000", "search.length=2048")  # the paper's steps, DISP-LLM's tokens
FULLS = {setting: SETTINGS[setting][1] for setting in WITH_ALL} | {"W1.6A16, faithful": "toga-q-faithful"}


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each setting."""
    for name, recipe in FULLS.items():
        yield Cell(
            key=f"full/{name}/{seed}", run=partial(compressed, bench, recipe, FULL, seed=seed), minutes=25,
            seed=seed, context=bench.context, texts=files(bench),
        )  # fmt: skip


def rows(results: Results) -> list[str]:
    """A table of the cells that were run, by setting and seed."""
    keys = {f"{name}, seed {seed}": f"full/{name}/{seed}" for name in FULLS for seed in SEEDS}
    run = {name: key for name, key in keys.items() if key in results}
    return texts_table(results, "learnt", run) if run else ["not run"]
