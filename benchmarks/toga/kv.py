"""How much quality does a KV cache in few bits cost by itself?

Cells: the original with each kind of KV cache, on two texts. About 20 minutes per cell.
Alone: `python benchmarks/run.py toga.kv --data DATA`
"""

from collections.abc import Iterator
from functools import partial

import yaml
from transformers import AutoConfig

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results
from toga.compressed import compressed, files, texts_table
from trimbit.model.kv_nbytes import cache_nbytes
from trimbit.schema.kv_cache import KVPrecision

SEEDS = (0,)
SHARED_MINUTES = 10.0
CACHES = {
    "exact": "null", "4 bits, a head": "{bits: 4}", "4 bits, group 32": "{bits: 4, group: 32}",
    "3 bits, a head": "{bits: 3}", "8 bits, a head": "{bits: 8}",
}  # fmt: skip
RECIPE = "rtn-w4a4"
UNQUANTISED = "search={name: preset, params: {blocks: bf16, embedding: bf16}}"
CONTEXT = 2048  # tokens, for the bytes that a cache takes


def overrides(precision: str) -> tuple[str, ...]:
    """Overrides of the recipe."""
    return (UNQUANTISED, f"kv_cache={precision}", "quant={name: rtn}")


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each kind of cache."""
    for kind, precision in CACHES.items():
        yield Cell(
            key=seeded(f"kv/{kind}", seed), run=partial(cached, bench, precision, seed), minutes=20, seed=seed,
            context=bench.context, texts=files(bench),
        )  # fmt: skip


def cached(bench: Bench, precision: str, seed: int) -> Found:
    """Quality with a kind of cache, and the bytes that keys and values take."""
    kept, config = yaml.safe_load(precision), AutoConfig.from_pretrained(bench.original(0))
    size = cache_nbytes(config, {}, None if kept is None else KVPrecision(**kept), CONTEXT)
    return compressed(bench, RECIPE, overrides(precision), seed=seed) | {"cache_nbytes": size}


def rows(results: Results) -> list[str]:
    """A table of bytes and quality by kind of cache."""
    return texts_table(results, "cache", {kind: f"kv/{kind}" for kind in CACHES}, "cache_nbytes")
