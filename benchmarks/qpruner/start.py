"""How should a low-rank pair be initialised: with zeros, LoftQ or QERA?

Cells: each initialisation with all blocks in one format of 4, 3 or 2 bits and the embedding in bf16; nothing is pruned
or trained. 3 to 6 minutes per cell. Alone: `python benchmarks/run.py qpruner.start --data DATA`
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

from harness.bench import TEST, TRAIN, Bench
from harness.cells import Cell, Found, seeded
from harness.quality import quality
from harness.records import run_fields
from harness.tables import Results, table
from trimbit.pipeline.flow import compress

SEEDS = (0,)
SHARED_MINUTES = 5.0  # for moments
FORMATS = {4: "nf4g64", 3: "uint3g64", 2: "uint2g64"}
STARTS = ("zeros", "loftq", "qera")
RANK = 8
RECIPE = "loftq-only"


def overrides(bits: int, start: str) -> tuple[str, ...]:
    """Overrides of the recipe."""
    pairs = (f"lowrank.init={start}", f"lowrank.rank={RANK}")
    return ("tune=null", "quant.scales=mse", f"search.blocks={FORMATS[bits]}", *pairs)


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each initialisation at each number of bits."""
    for bits, start in product(FORMATS, STARTS):
        yield Cell(
            key=seeded(_key(bits, start), seed), run=partial(started, bench, bits, start, seed),
            minutes=6 if start == "qera" else 3, seed=seed, context=bench.context,
            texts=(bench.data / TEST, bench.data / TRAIN),
        )  # fmt: skip


def _key(bits: int, start: str) -> str:
    return f"start/{bits} bits/{start}" + (f" {RANK}" if start != "zeros" else "")


def started(bench: Bench, bits: int, start: str, seed: int) -> Found:
    """Quality before any training."""
    with bench.scratch() as out:
        compress(bench.job(RECIPE, seed, overrides(bits, start)), None, out)
        return run_fields(out) | quality(bench, out, bench.original(seed))


def rows(results: Results) -> list[str]:
    """A table of KL and perplexity by format and initialisation."""
    found = []
    for bits, precision in FORMATS.items():
        own = [results.get(_key(bits, start)) for start in STARTS]
        found.append([precision, *(f"{c['kl']:.4f} (ppl {c['ppl@2048']:.2f})" if c else "not run" for c in own)])
    return table(["blocks", "zeros", *(f"{start}, rank {RANK}" for start in STARTS[1:])], found)
