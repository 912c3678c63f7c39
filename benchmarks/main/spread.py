"""What makes predicted damage differ from one run to another: the labels that are drawn, or the text?

One cell: the damage of every site at 4 bits, from one draw of a label a token and from four, on two sets of four rows
of 512 tokens. About 5 minutes. Alone: `python benchmarks/run.py main.spread --data DATA`
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
from torch import Tensor

from harness.bench import TRAIN, Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results, table
from trimbit.measure.predict import predict
from trimbit.pipeline.job import Job
from trimbit.pipeline.oracle import ModelOracle
from trimbit.pipeline.prepare import Prepared, prepare
from trimbit.trial.expected import ExpectedErrors

SEEDS = (0,)
SHARED_MINUTES = 0.0
KEY = "predicted/spread"
FORMAT, ROWS = "uint4g64", 4
ONE_FORMAT = (f"measure.rows={2 * ROWS}", f"space.formats=[{FORMAT}]", "space.embedding_formats=[uint8g64]")
RUNS = {  # draws, seed of the labels, set of rows
    "one draw": (1, 0, 0), "one draw, other labels": (1, 1, 0), "one draw, other rows": (1, 0, 1),
    "four draws": (4, 0, 0), "four draws, other rows": (4, 0, 1),
}  # fmt: skip
PAIRS = (
    ("one draw", "one draw, other labels"), ("one draw", "one draw, other rows"),
    ("four draws", "four draws, other rows"),
)  # fmt: skip


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """The one cell."""
    yield Cell(
        key=seeded(KEY, seed), run=partial(compared, bench, seed), minutes=5, seed=seed, texts=(bench.data / TRAIN,)
    )


def compared(bench: Bench, seed: int) -> Found:
    """Predicted damage of each site by run, in nats a token."""
    job = bench.job("knapsack-nopruning", seed, ONE_FORMAT)
    prepared = prepare(job)
    assert prepared.text is not None
    assert prepared.text.damage is not None
    halves = prepared.text.damage.tokens.split(ROWS)
    return {name: _damage(job, prepared, halves[rows], draws, own) for name, (draws, own, rows) in RUNS.items()}


def _damage(job: Job, prepared: Prepared, rows: Tensor, draws: int, seed: int) -> dict[str, float]:
    config = job.steps.quant.config
    errors = ExpectedErrors(job.stream.checkpoint, job.layout, prepared.stats, config)
    with ModelOracle(job, prepared) as oracle:
        found = predict(
            job.stream, rows, draws, seed, job.space, errors, oracle.candidates.change, prepared.rankings, job.model,
            "", lambda *_: None,
        )  # fmt: skip
    return {one.site: one.damage for one in found.formats if one.precision.name == FORMAT}


def rows(results: Results) -> list[str]:
    """A table of how far the logarithms of two runs are apart."""
    if (cell := results.get(KEY)) is None:
        return ["Not run yet."]
    lines = []
    for pair in PAIRS:
        one, other = (np.array(list(cell[name].values())) for name in pair)
        apart = np.log(one / other)
        lines.append([*pair, f"{np.median(abs(apart)):.3f}", f"{apart.std():.3f}", f"{one.sum() / other.sum():.2f}"])
    return table(["run", "and", "median", "standard deviation", "sums"], lines)
