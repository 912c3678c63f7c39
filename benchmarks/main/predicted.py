"""Is predicted damage as good as measured damage?

Cells: the damage of every choice of the knapsack, measured and predicted; then the models that it makes from measured
damage, to compare with those of `budgets`. The first cell measures all choices, about an hour; the others take about 10
minutes.
Alone: `python benchmarks/run.py main.predicted --data DATA`
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from harness.bench import TEST, TRAIN, Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results, table
from main.budgets import BUDGETS, within
from trimbit.pipeline.oracle import ModelOracle, problem_of
from trimbit.pipeline.prepare import prepare
from trimbit.search.methods.knapsack import background

SEEDS = (0,)
SHARED_MINUTES = 5.0  # for the backward sweep, and running the model without each sub-block
RECIPE = "knapsack"
MEASURED = "measure.by=measured"
CHOICES = "predicted/choices"
FEW = 10  # with fewer choices, a kind's correlation says nothing


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for all choices, then one for each budget."""
    yield Cell(key=seeded(CHOICES, seed), run=partial(compared, bench, seed), minutes=1, seed=seed)
    for budget in BUDGETS:
        yield Cell(
            key=seeded(f"measured/{RECIPE}/{budget}", seed),
            run=partial(within, bench, RECIPE, budget, seed, (MEASURED,)),
            minutes=12, seed=seed, context=bench.context, texts=(bench.data / TEST, bench.data / TRAIN),
        )  # fmt: skip


def compared(bench: Bench, seed: int) -> Found:
    """[kind, measured, predicted] for every choice, as KL in nats per token."""
    found = []
    for overrides in ((MEASURED,), ()):
        job = bench.job(RECIPE, seed, overrides)
        prepared = prepare(job)
        with ModelOracle(job, prepared) as oracle:
            around = background(problem_of(job, 0, oracle), job.steps.search)
            found.append(oracle.damage(around, 0))
            full = {unit.dim: unit.size for unit in job.layout.units.values()}
            records = {one.stage: one.seconds for one in job.runner.records.values() if not one.cached}
    measured, predicted = found
    formats = {(one.site, one.precision.name): one.damage for one in predicted.formats}
    choices = [
        (one.precision.name, one.damage, formats[one.site, one.precision.name])
        for one in measured.formats
        if (one.site, one.precision.name) in formats and one.damage != 0
    ]
    widths = {(one.dim, one.width): one.damage for one in predicted.widths if one.by == "predicted"}
    choices += [
        (_cut(one.dim, one.width / full[one.dim]), one.damage, widths[one.dim, one.width])
        for one in measured.widths
        if (one.dim, one.width) in widths and one.width != full[one.dim]
    ]
    return {"choices": choices, "stage_seconds": records}


def _cut(dim: str, share: float) -> str:
    """The kind of a cut, such as `mid 0.50`."""
    return f"{dim.rsplit('.', 1)[1]} {share:.2f}"


def rows(results: Results) -> list[str]:
    """Tables of agreement by kind of choice, and of quality by budget."""
    cell = results.get(CHOICES)
    if cell is None:
        return []
    by: dict[str, list[list[Any]]] = {}
    for choice in cell["choices"]:
        by.setdefault(choice[0], []).append(choice)
    lines = [[kind, *_agreement(own)] for kind, own in sorted(by.items())]
    lines.append(["all", *_agreement(cell["choices"])])
    found = table(
        ["kind", "choices", "rank correlation", "of logarithms", "sum, predicted / measured"], lines, tight=True
    )
    quality = []
    for budget in BUDGETS:
        keys = {"measured": f"measured/{RECIPE}/{budget}", "predicted": f"budget/{RECIPE}/{budget}"}
        if keys["measured"] not in results or results.get(keys["predicted"], {}).get("damage") != "predicted":
            continue
        for name, own in ((name, results[key]) for name, key in keys.items() if key in results):
            cut = str(len(own["cut"]))
            quality.append([budget, name, f"{own['ppl@2048']:.2f}", f"{own['kl']:.3f}", own["method"], cut])
    heads = ["budget", "damage", "ppl@2048", "KL", "chosen", "sub-blocks cut"]
    return [*found, "", *table(heads, quality, tight=True)] if quality else found


def _agreement(choices: list[list[Any]]) -> list[str]:
    if len(choices) < FEW:
        return [str(len(choices)), "", "", ""]
    _, measured, predicted = (np.array(own) for own in zip(*choices, strict=True))
    both = (measured > 0) & (predicted > 0)
    logs = np.corrcoef(np.log(measured[both]), np.log(predicted[both]))[0, 1]
    rank = spearmanr(measured, predicted).statistic
    return [str(len(choices)), f"{rank:.3f}", f"{logs:.3f}", f"{predicted.sum() / measured.sum():.2f}"]


def draw(results: Results, path: Path) -> None:
    """Plot predicted against measured damage, one point per choice, on logarithmic axes."""
    from matplotlib import pyplot

    cell = results.get(CHOICES)
    if cell is None:
        return
    figure, axes = pyplot.subplots(figsize=(6, 5.4), layout="constrained")
    for kind in sorted({choice[0] for choice in cell["choices"]}):
        points = [choice[1:] for choice in cell["choices"] if choice[0] == kind and min(choice[1:]) > 0]
        axes.scatter([own for own, _ in points], [own for _, own in points], s=8, label=kind)
    axes.plot([1e-5, 10], [1e-5, 10], color="grey", linewidth=0.8)
    axes.set(
        xscale="log", yscale="log", xlabel="measured, nats a token", ylabel="predicted", title="Damage of each choice"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
