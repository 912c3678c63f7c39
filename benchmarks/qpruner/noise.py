"""Can accuracy rank plans: what would a search by accuracy see?

One cell: KL, NLL and HellaSwag accuracy of the plans of `plans` within the same bytes, seed 0. About 40 minutes once
`plans` has run.
Alone: `python benchmarks/run.py qpruner.noise --data DATA`
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from scipy.stats import spearmanr

from harness.bench import TEST, TRAIN, Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results, table
from qpruner.plans import MENUS, searched, searches
from qpruner.statistics import paired
from qpruner.whole import DOCUMENTS
from trimbit.pipeline.oracle import ModelOracle
from trimbit.pipeline.prepare import prepare

SEEDS = (0,)
SHARED_MINUTES = 0.0
MENU = next(iter(MENUS))
KEY = f"noise/{MENU}"
RANDOM = 5  # random plans, spread from the best to the worst


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """The one cell."""
    yield Cell(
        key=seeded(KEY, seed), run=partial(outcomes, bench, seed), minutes=40, seed=seed,
        texts=(bench.data / TEST, bench.data / TRAIN),
    )  # fmt: skip


def outcomes(bench: Bench, seed: int) -> Found:
    """What a search by accuracy would know about each plan."""
    found = searched(bench, MENU, seed)
    recipe, overrides = searches(MENUS[MENU])["qpruner-3"]
    folder = bench.data / "tasks"
    asked = f"search.objective={{by: accuracy, tasks: [hellaswag], data: {folder}, documents: {DOCUMENTS}}}"
    job = bench.job(recipe, seed, (*overrides, asked))
    order = sorted(range(len(found.random)), key=found.random_kls.__getitem__)
    spread = [found.random[order[round(at * (len(order) - 1) / (RANDOM - 1))]] for at in range(RANDOM)]
    plans = found.plans | {f"random {at}": plan for at, plan in enumerate(spread)}
    assert job.objective is not None
    with ModelOracle(job, prepare(job)) as oracle:
        known = {name: oracle.outcome(plan, job.objective) for name, plan in plans.items()}
    return {
        "plans": {
            name: outcome.model_dump() | {"nbytes": plans[name].found_by.nbytes} for name, outcome in known.items()
        }
    }


def rows(results: Results) -> list[str]:
    """A table of the plans by KL, and a sentence on how accuracy correlates with KL."""
    cell = results.get(KEY)
    heads = ["plan", "MB", "KL", "NLL", "HellaSwag, %", "above the plan of least KL"]
    if cell is None:
        return table(heads, [["not run", *[""] * 5]])
    plans = sorted(cell["plans"].items(), key=lambda one: one[1]["kl"])
    best, found = plans[0][1], []
    for name, c in plans:
        accuracy = f"{100 * c['accuracy']:.1f} ± {100 * c['stderr']:.1f}"
        gain = "" if c is best else "{:+.1f} ± {:.1f}".format(*paired(*({"": o["correct"]} for o in (c, best))))
        found.append([name, f"{c['nbytes'] / 1e6:.1f}", f"{c['kl']:.4f}", f"{c['nll']:.4f}", accuracy, gain])
    rho, low, high = _agreement(list(cell["plans"].values()))
    return [
        *table(heads, found),
        "",
        f"Spearman's rho of -KL and accuracy over these plans: {rho:.2f}; documents drawn again, 90 % of "
        f"the time {low:.2f} to {high:.2f}.",
    ]


def _agreement(plans: Sequence[Found]) -> tuple[float, float, float]:
    """Spearman's rho of -KL and accuracy, and its bootstrap quantiles of 5 and 95 % over documents."""
    answers = np.array([[int(one) for one in plan["correct"]] for plan in plans])
    kls, rng = [-plan["kl"] for plan in plans], np.random.default_rng(0)
    drawn = [answers[:, rng.integers(answers.shape[1], size=answers.shape[1])].mean(1) for _ in range(1000)]
    low, high = np.quantile([spearmanr(kls, means).statistic for means in drawn], [0.05, 0.95])
    return float(spearmanr(kls, answers.mean(1)).statistic), float(low), float(high)
