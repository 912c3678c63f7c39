"""What does importance predict: does it rank blocks by what 8 bits in each of them gain?

Cells: the pruned and the whole model, for three seeds. Each has the KL on test text of both estimators' plans, of
random plans of the same bytes, and of plans with 8 bits in a single block. 12 to 20 minutes per cell.
Alone: `python benchmarks/run.py qpruner.estimators --data DATA`
"""

from collections.abc import Iterator
from functools import partial

import torch
from scipy.stats import spearmanr

from harness.bench import TEST, TRAIN, Bench
from harness.cells import Cell, Found
from harness.tables import Results, table
from qpruner.plans import CONTEXT, PRUNED, RANDOM, on_test_text
from qpruner.ranks import ESTIMATORS
from qpruner.statistics import SEEDS as SAMPLES
from qpruner.statistics import mean_and_sd, seed_rows
from trimbit.pipeline.flow import find_plan
from trimbit.pipeline.oracle import ModelOracle, problem_of
from trimbit.pipeline.preflight import preflight
from trimbit.pipeline.prepare import layer_importance, prepare
from trimbit.schema.budget import Budget
from trimbit.search.solvers.box import Box, feasible_points
from trimbit.search.variables import variables

SEEDS = SAMPLES
SHARED_MINUTES = 0.0
MODELS: dict[str, tuple[str, ...]] = {"pruned by 20 %": (), "not pruned": ("prune=null",)}
RECIPE = "qpruner-2"


def overrides(model: str, estimator: str) -> tuple[str, ...]:
    """Overrides of the recipe."""
    return (*PRUNED, *MODELS[model], f"importance.estimator={estimator}")


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each model."""
    for model in MODELS:
        yield Cell(
            key=f"estimators/{model}/seed {seed}", run=partial(compare, bench, model, seed), minutes=18,
            seed=seed, context=CONTEXT, texts=(bench.data / TEST, bench.data / TRAIN),
        )  # fmt: skip


def compare(bench: Bench, model: str, seed: int) -> Found:
    """KL of plans by importance and of random plans, and what 8 bits in each single block gain."""
    jobs = {name: bench.job(RECIPE, seed, overrides(model, name)) for name in ESTIMATORS}
    first = jobs[ESTIMATORS[0]]
    nbytes = preflight(first, None)
    plans = {name: find_plan(job, Budget.parse(f"{nbytes}B")).plan for name, job in jobs.items()}
    importance = {name: layer_importance(job, prepare(job)) for name, job in jobs.items()}
    kl_of = on_test_text(bench, first, seed)
    with ModelOracle(first, prepare(first)) as oracle:
        own = variables(problem_of(first, nbytes, oracle), "block")
    box = Box(costs=own.costs, values=((4.0, 8.0),) * len(own.costs), room_nbytes=own.room_nbytes)
    points = feasible_points(box, RANDOM, torch.Generator().manual_seed(seed))
    raised = [tuple(int(at == one) for at in range(len(own.costs))) for one in range(len(own.costs))]
    lowest = kl_of(own.plan(box.lowest, "lowest"))
    return {
        "kl": {name: kl_of(plan) for name, plan in plans.items()},
        "random_kls": [kl_of(own.plan(point, "random")) for point in points],
        "worth": {name: lowest - kl_of(own.plan(p, "one")) for name, p in zip(own.covers, raised, strict=True)},
        "lowest_kl": lowest,
        "importance": {name: {key: found[key] for key in own.covers} for name, found in importance.items()},
    }


def rows(results: Results) -> list[str]:
    """A table of KL by importance and at random, and of how well importance ranks what bits are worth."""

    def figures(model: str, seed: int, c: Found) -> list[str]:
        worth = list(c["worth"].values())
        rhos = [spearmanr(list(c["importance"][name].values()), worth).statistic for name in ESTIMATORS]
        other = results.get(f"estimators/{model}/seed {(seed + 1) % len(SEEDS)}")
        alike = f"{spearmanr(worth, list(other['worth'].values())).statistic:.2f}" if other else ""
        kls = (f"{c['kl'][name]:.4f}" for name in ESTIMATORS)
        spread = f"{min(worth):.4f} to {max(worth):.4f}"
        return [mean_and_sd(c["random_kls"]), *kls, *(f"{rho:.2f}" for rho in rhos), spread, alike]

    heads = [
        "model", "seed", "KL, random plans", *(f"by {name}" for name in ESTIMATORS),
        *(f"rho of {name} and worth" for name in ESTIMATORS), "worth of 8 bits in a block", "rho of worth, next seed",
    ]  # fmt: skip
    return table(heads, seed_rows(results, "estimators", MODELS, 7, figures))
