"""Is the predicted damage of whole plans as good as that of single choices?

One cell: plans drawn at random, their predicted damage, and the KL of the models that they make. A plan is the
knapsack's answer, within a random budget, to damage with so much noise that it may be any. About 25 minutes.
Alone: `python benchmarks/run.py main.plans --data DATA`
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from harness.bench import TRAIN, Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results, table
from trimbit.measure.choices import background_of
from trimbit.model.layout import Layout
from trimbit.pipeline.oracle import ModelOracle, problem_of
from trimbit.pipeline.prepare import prepare
from trimbit.schema.measurements import Measurements
from trimbit.schema.plan import Plan
from trimbit.search.methods.knapsack import Config, background, solve
from trimbit.search.prices import Prices

SEEDS = (0,)
SHARED_MINUTES = 5.0
KEY = "predicted/plans"
RECIPE = "knapsack"
PLANS = 100
LEAST, MOST = 36e6, 90e6  # bytes
NOISE = 1.5  # standard deviation of the logarithm of what damage is multiplied by
PRUNED = 0.5  # share of the plans that may prune
BOUNDS = (0.0, 0.1, 0.3, 1.0, 3.0)  # of the KL of the rows of the table


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """The one cell."""
    yield Cell(
        key=seeded(KEY, seed), run=partial(compared, bench, seed), minutes=25, seed=seed, texts=(bench.data / TRAIN,)
    )


def compared(bench: Bench, seed: int) -> Found:
    """[bytes, sub-blocks cut, predicted, real KL] for every plan, in nats a token."""
    job, draw = bench.job(RECIPE, seed), np.random.default_rng(seed)
    prepared = prepare(job)
    found = []
    with ModelOracle(job, prepared) as oracle:
        damage = oracle.damage(background(problem_of(job, 0, oracle), job.steps.search), 0)
        for _ in range(PLANS):
            problem = problem_of(job, int(np.exp(draw.uniform(np.log(LEAST), np.log(MOST)))), oracle)
            solved = solve(problem, Config(), _noisy(damage, draw), Prices(), prune=draw.random() < PRUNED)
            assert solved is not None, "these budgets hold a plan"
            plan, _ = solved
            predicted = predicted_damage(plan, damage, job.layout)
            found.append([plan.found_by.nbytes, len(plan.cuts), predicted, oracle.estimate_kl(plan)])
    return {"plans": found}


def _noisy(damage: Measurements, draw: np.random.Generator) -> Measurements:
    def times(damage: float) -> float:
        return damage * float(np.exp(draw.normal(0, NOISE)))

    formats = tuple(one.model_copy(update={"damage": times(one.damage)}) for one in damage.formats)
    widths = tuple(one.model_copy(update={"damage": times(one.damage)}) for one in damage.widths)
    return damage.model_copy(update={"formats": formats, "widths": widths})


def predicted_damage(plan: Plan, damage: Measurements, layout: Layout) -> float:
    """The sum of the damage of a plan's choices, as the knapsack adds it up."""
    own = background_of(plan, layout)
    units = {layout.weights[name].site if unit.block is not None else unit.name: unit
             for unit in layout.units.values() for name in unit.weights}  # fmt: skip
    cut = sum(one.damage for one in damage.widths if own.widths.get(one.dim) == one.width)
    shares = {name: own.widths.get(unit.dim or "", unit.size) / unit.size for name, unit in units.items()}
    return cut + sum(
        shares[one.site] * one.damage for one in damage.formats if own.formats[one.site] == one.precision
    )  # fmt: skip


def rows(results: Results) -> list[str]:
    """Agreement of predicted damage with real KL, for all plans and for those of similar KL."""
    if (cell := results.get(KEY)) is None:
        return ["Not run yet."]
    _, cut, predicted, real = np.array(cell["plans"], dtype=float).T
    bounds = [(low, high) for low, high in zip(BOUNDS, (*BOUNDS[1:], np.inf), strict=True)]
    picks = {f"{low:g} to {high:g} nats": (real >= low) & (real < high) for low, high in bounds}
    picks |= {"nothing cut": cut == 0, "some cut": cut > 0, "all": real >= 0}
    lines = []
    for name, own in picks.items():
        if own.sum() < 3:
            lines.append([name, str(own.sum()), "", ""])
            continue
        rank = spearmanr(predicted[own], real[own]).statistic
        ratio = float(np.exp(np.mean(np.log(predicted[own] / real[own]))))
        lines.append([name, str(own.sum()), f"{rank:.3f}", f"{ratio:.2f}"])
    return table(["plans", "number", "rank correlation", "mean ratio, predicted / real"], lines, tight=True)


def draw(results: Results, path: Path) -> None:
    """Plot the real KL of each plan against the predicted one, on logarithmic axes."""
    from matplotlib import pyplot

    if (cell := results.get(KEY)) is None:
        return
    figure, axes = pyplot.subplots(figsize=(6, 5.4), layout="constrained")
    _, cut, predicted, real = np.array(cell["plans"], dtype=float).T
    for name, own in (("nothing cut", cut == 0), ("some sub-blocks cut", cut > 0)):
        axes.scatter(real[own], predicted[own], s=14, label=name)
    ends = [min(real.min(), predicted.min()), max(real.max(), predicted.max())]
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    axes.set(
        xscale="log", yscale="log", xlabel="real KL, nats a token", ylabel="predicted", title="Damage of random plans"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
