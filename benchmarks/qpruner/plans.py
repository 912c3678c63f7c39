"""Which search finds the best plan within the same bytes: by importance, by trials, at random or by measured damage?

Cells: two sets of formats for three seeds, pruned by 20 %, without recovery. 25 to 30 minutes per cell.
Alone: `python benchmarks/run.py qpruner.plans --data DATA`
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from harness.bench import TEST, TRAIN, Bench
from harness.cells import Cell, Found
from harness.tables import Results, table
from qpruner.statistics import SEEDS as SAMPLES
from qpruner.statistics import mean_and_sd, seed_rows
from trimbit.calibrate.text import evaluation_windows
from trimbit.measure.choices import background_of
from trimbit.measure.damage import install
from trimbit.measure.kl_probe import KLProbe
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.pipeline.flow import find_plan
from trimbit.pipeline.job import Job
from trimbit.pipeline.oracle import ModelOracle, problem_of
from trimbit.pipeline.preflight import preflight
from trimbit.pipeline.prepare import layer_importance, prepare
from trimbit.runtime.load import load_tokenizer
from trimbit.schema.budget import Budget
from trimbit.schema.plan import Plan
from trimbit.search.variables import Per, variables

SEEDS = SAMPLES
SHARED_MINUTES = 0.0
RANDOM = 10  # random plans measured on test text
CONTEXT, WINDOWS = 512, 16  # of test text


class Menu(NamedTuple):
    """What shares a format, the formats, how scales are found, and whether the budget is uniform NF4's."""

    per: Per
    formats: str
    scales: str
    like_uniform: bool


MENUS = {
    "4 and 8 bits by block": Menu("block", "nf4g64, int8row", "absmax", like_uniform=False),
    "2, 3, 4 and 8 bits by weight": Menu("weight", "uint2g64, uint3g64, nf4g64, int8row", "mse", like_uniform=True),
}
KNAPSACK = "search={name: knapsack, params: {plans: 1, no_pruning: false}}"
PRUNED = ("tune=null", "prune.ratio=0.2")
NO_SMALLER = "search.optimiser.smaller=0"


def searches(menu: Menu) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The recipe and the overrides of each search."""
    shared = (*PRUNED, f"space.formats=[{menu.formats}]", f"quant.scales={menu.scales}")
    per = f"search.per={menu.per}"
    return {
        "qpruner-2": ("qpruner-2", (*shared, per)),
        "qpruner-3": ("qpruner-3", (*shared, NO_SMALLER, per)),
        "best of random": ("qpruner-3", (*shared, NO_SMALLER, per, "search.engine=random")),
        "knapsack": ("qpruner-3", (*shared, KNAPSACK)),
    }


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each menu."""
    for name in MENUS:
        yield Cell(
            key=f"plans/{name}/seed {seed}", run=partial(compare, bench, name, seed), minutes=28, seed=seed,
            context=CONTEXT, texts=(bench.data / TEST, bench.data / TRAIN),
        )  # fmt: skip


class Searched(NamedTuple):
    """Plans for one model within the same bytes, and the job that can apply them."""

    job: Job
    nbytes: int
    plans: dict[str, Plan]
    random: list[Plan]
    random_kls: list[float]  # on the rows by which plans are chosen
    seconds: dict[str, float]


def searched(bench: Bench, name: str, seed: int) -> Searched:
    """What each search finds; what they share is made first, so that no search is charged for it."""
    menu = MENUS[name]
    uniform = find_plan(bench.job("qpruner-1", seed, (*PRUNED, f"quant.scales={menu.scales}")), None).plan
    jobs = {method: bench.job(recipe, seed, own) for method, (recipe, own) in searches(menu).items()}
    nbytes = preflight(jobs["qpruner-2"], None)
    if menu.like_uniform:  # the uniform plan's bytes for block weights, and what searches keep free for longer headers
        own = variables(problem_of(jobs["qpruner-3"], uniform.found_by.nbytes), menu.per)
        held = sum(costs[[p.name for p in own.formats].index("nf4g64")] for costs in own.costs)
        nbytes = uniform.found_by.nbytes + held - own.room_nbytes
    first = jobs["qpruner-2"]
    prepared = prepare(first)
    layer_importance(first, prepared)
    with ModelOracle(first, prepared) as oracle:
        oracle.candidates.make(lambda _done, _total: None)
    found, seconds = {}, {}
    for method, job in jobs.items():
        started = time.perf_counter()
        found[method] = find_plan(job, Budget.parse(f"{nbytes}B"))
        seconds[method] = round(time.perf_counter() - started, 1)
    tried = found["best of random"].tried[1:]  # the first one tried is the plan by importance
    kls = [one.outcome.kl for one in tried if one.outcome is not None]
    plans = {"uniform": uniform} | {method: own.plan for method, own in found.items()}
    return Searched(jobs["qpruner-3"], nbytes, plans, [one.plan for one in tried], kls, seconds)


def compare(bench: Bench, name: str, seed: int) -> Found:
    """KL of each plan on test text, with weights from candidates, which equal those that would be written."""
    found = searched(bench, name, seed)
    kl_of = on_test_text(bench, found.job, seed)
    return {
        "limit": found.nbytes, "seconds_each": found.seconds,
        "nbytes": {method: plan.found_by.nbytes for method, plan in found.plans.items()},
        "kl": {method: kl_of(plan) for method, plan in found.plans.items()},
        "random_kls": [kl_of(plan) for plan in found.random[:RANDOM]], "held_out_random_kls": found.random_kls,
    }  # fmt: skip


def on_test_text(bench: Bench, job: Job, seed: int) -> Callable[[Plan], float]:
    """A function that gives the KL of a plan on test text."""
    tokenizer = load_tokenizer(bench.original(seed))
    windows = evaluation_windows(bench.data / TEST, tokenizer, context=CONTEXT, max_windows=WINDOWS)
    probe = KLProbe(InMemoryModel(job.stream), windows, repeated=False)
    with ModelOracle(job, prepare(job)) as oracle:
        candidates = oracle.candidates

    def kl(plan: Plan) -> float:
        install(probe.whole, job.layout, candidates, background_of(plan, job.layout))
        return probe.damage(None)

    return kl


def rows(results: Results) -> list[str]:
    """A table of KL by search, menu and seed."""

    def figures(_name: str, _seed: int, c: Found) -> list[str]:
        kls = c["kl"]
        own = [f"{kls[method]:.4f}" for method in ("best of random", "qpruner-2", "qpruner-3", "knapsack")]
        uniform = f"{kls['uniform']:.4f} ({c['nbytes']['uniform'] / 1e6:.1f} MB)"
        return [f"{c['limit'] / 1e6:.1f}", uniform, mean_and_sd(c["random_kls"]), *own]

    heads = ["formats", "seed", "budget, MB", "uniform NF4", "random, mean ± sd", "best of 40 random"]
    return table([*heads, "qpruner-2", "qpruner-3", "knapsack"], seed_rows(results, "plans", MENUS, 7, figures))
