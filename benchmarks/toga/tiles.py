"""What do whole tiles cost: high channels chosen one by one, or 8, 16 or 32 together?

One cell at W3.2A3.2: for each tile size, the KL that the search sees with equally many high codes, chosen by the same
logits. It takes minutes once `toga.settings` has learnt the masks, else an hour.
Alone: `python benchmarks/run.py toga.tiles --data DATA`
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results, table
from toga.compressed import files, opened
from toga.masks import ready
from toga.methods import SETTINGS
from trimbit.pipeline.flow import find_plan
from trimbit.pipeline.job import Job
from trimbit.pipeline.keys import PlanKey
from trimbit.search.methods.toga import learn
from trimbit.search.two_formats.tiles import TileProblem, as_masks

SEEDS = (0,)
SHARED_MINUTES = 0.0
TILES = (1, 8, 16, 32)  # channels
RECIPE = SETTINGS["W3.2A3.2"][1]


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """The one cell."""
    yield Cell(
        key=seeded("tiles", seed), run=partial(by_tile, bench, seed), minutes=60, seed=seed, texts=files(bench, ())
    )  # fmt: skip


def by_tile(bench: Bench, seed: int) -> Found:
    """KL by tile size, on the rows by which plans are chosen."""
    job = opened(bench, RECIPE, seed=seed)
    with ready(job) as own, TemporaryDirectory() as folder:
        shutil.copy(_trained(job), folder)
        config, problem = job.steps.search, replace(own.problem, state=Path(folder))
        logits, _ = learn(problem, config, own.sites)  # loads the trained logits: no step is left
        highest = {tile: _highest(logits, own.sites, tile) for tile in TILES}
        free = [len(high) for high in highest[1].values()]
        return {
            "kl": {tile: own.masked.damage(as_masks(high, own.sites)).kl for tile, high in highest.items()},
            "less than half a tile": sum(count < config.tile / 2 for count in free) / len(free),
        }


def _trained(job: Job) -> Path:
    """The file with the state of the masks' training, which runs now if it has not yet."""
    find_plan(job, None)
    (record,) = (record for record in job.runner.records.values() if record.stage == PlanKey.stage)
    return job.runner.cache.path(record.stage, record.key) / "masks.safetensors"


def _highest(logits: Mapping[str, Tensor], sites: TileProblem, tile: int) -> dict[str, list[int]]:
    """The high channels of each site if tiles of this size, those with the highest logits first, fill the budget."""
    orders = {site: own.argsort(descending=True, stable=True) for site, own in logits.items()}
    means = {site: own[orders[site]].view(-1, tile).mean(-1).tolist() for site, own in logits.items()}
    ranked = sorted((-mean, at, site) for site, own in means.items() for at, mean in enumerate(own))
    high, left = {site: list[int]() for site in logits}, sites.codes(sites.uniform_within_budget)
    for _, at, site in ranked:
        if (codes := sites.rows[site] * tile) <= left:
            high[site] += orders[site][at * tile : (at + 1) * tile].tolist()
            left -= codes
    return high


def rows(results: Results) -> list[str]:
    """A table of KL by tile size."""
    cell = results.get("tiles")
    figures = [f"{cell['kl'][str(tile)]:.3f}" if cell else "not run" for tile in TILES]
    return table(["single channels" if tile == 1 else f"tiles of {tile}" for tile in TILES], [figures])
