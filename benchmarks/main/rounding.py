"""How much better is GPTQ than rounding to nearest, at 4, 3 and 2 bits?

Cells: the dense model, and the weights of its blocks in one format (group 64 with a zero point, the embedding in bf16)
by each method. About 4 minutes per cell. Alone: `python benchmarks/run.py main.rounding --data DATA`
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

from harness.bench import TEST, TRAIN, Bench
from harness.cells import Cell, Found
from harness.quality import quality
from harness.records import run_fields
from harness.tables import Results, table
from trimbit.artifact.files import weight_nbytes
from trimbit.measure.choices import sites_of
from trimbit.pipeline.flow import apply
from trimbit.pipeline.oracle import problem_of
from trimbit.schema.precision import BF16, parse_precision

SEEDS = (0,)
SHARED_MINUTES = 5.0  # for the moments of each seed's model, and the original's outputs
RECIPES = {"rtn": "uniform-rtn", "gptq": "uniform-gptq"}
BITS = (4, 3, 2)


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for the dense model, then one for each method and number of bits."""
    texts = (bench.data / TEST, bench.data / TRAIN)
    yield Cell(
        key=f"dense/seed {seed}", run=partial(dense, bench, seed), minutes=3, seed=seed, context=bench.context,
        texts=texts[:1],
    )  # fmt: skip
    for method, bits in product(RECIPES, BITS):
        yield Cell(
            key=f"grid/{method}/{bits} bits/seed {seed}",
            run=partial(rounded, bench, method, bits, seed),
            minutes=4 if method == "gptq" else 3, seed=seed, context=bench.context, texts=texts,
        )  # fmt: skip


def dense(bench: Bench, seed: int) -> Found:
    """Bytes and quality of the dense model."""
    original = bench.original(seed)
    return {"nbytes": weight_nbytes(original)} | quality(bench, original, original)


def rounded(bench: Bench, method: str, bits: int, seed: int) -> Found:
    """Bytes and quality with all weights of the blocks in one format."""
    job, precision = bench.job(RECIPES[method], seed), parse_precision(f"uint{bits}g64")
    formats = {
        site: BF16 if unit.block is None else precision
        for unit in job.layout.units.values()
        for site in sites_of(job.layout, unit)
    }
    plan = problem_of(job, 0).plan({}, formats, f"{method} {bits}, blocks only")
    with bench.scratch() as out:
        apply(job, plan, out)
        return run_fields(out) | quality(bench, out, bench.original(seed))


def rows(results: Results) -> list[str]:
    """A table of perplexity by method, bits and seed."""

    def figures(key: str) -> list[str]:
        found = [results.get(f"{key}/seed {seed}") for seed in SEEDS]
        return ["not run" if cell is None else f"{cell['ppl@2048']:.2f}" for cell in found]

    heads = ["block weights, group 64 with zero point", "bits", *(f"seed {seed}" for seed in SEEDS)]
    each = [[method, str(bits), *figures(f"grid/{method}/{bits} bits")] for method, bits in product(RECIPES, BITS)]
    return table(heads, [["dense", "16", *figures("dense")], *each], tight=True)
