"""What does choosing widths and bits together give, compared with bits alone and with one format for all?

Cells: five file sizes by three recipes, and two of them by a plan made by hand (`main.tail`). A plan that several
recipes try is applied once, and damage is predicted once for all budgets, so the first cell takes about 20 minutes, the
others 5 to 15.
Alone: `python benchmarks/run.py main.budgets --data DATA`, one budget: `--only '*/45MB'`, other seeds: `--seeds 1 2`
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

from harness.bench import TEST, TRAIN, Bench
from harness.cells import Cell, Found, seeded
from harness.quality import quality
from harness.records import run_fields
from harness.tables import Results, table
from main.tail import tail_high
from trimbit.pipeline.flow import apply, compress
from trimbit.pipeline.job import Job
from trimbit.schema.budget import Budget
from trimbit.schema.plan import Plan

SEEDS = (0,)
SHARED_MINUTES = 12.0  # moments, candidates and the damage of every choice, with and without pruning
BUDGETS = ("90MB", "72MB", "55MB", "45MB", "36MB")
RECIPES = {"uniform-gptq": 4, "knapsack-nopruning": 8, "knapsack": 12}  # minutes
TAIL, TAIL_BUDGETS = "tail-high", ("72MB", "55MB")


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each recipe at each budget; the widest search goes first, so that others reuse what it applied."""
    for budget, recipe in product(BUDGETS, reversed(RECIPES)):
        yield Cell(
            key=seeded(f"budget/{recipe}/{budget}", seed),
            run=partial(within, bench, recipe, budget, seed),
            minutes=RECIPES[recipe], seed=seed, context=bench.context,
            texts=(bench.data / TEST, bench.data / TRAIN),
        )  # fmt: skip
    for budget in TAIL_BUDGETS:
        yield Cell(
            key=seeded(f"budget/{TAIL}/{budget}", seed), run=partial(by_hand, bench, budget, seed),
            minutes=RECIPES["uniform-gptq"], seed=seed, context=bench.context,
            texts=(bench.data / TEST, bench.data / TRAIN),
        )  # fmt: skip


def by_hand(bench: Bench, budget: str, seed: int) -> Found:
    """Bytes and quality of the plan whose last blocks have more bits."""
    job, limit = bench.job("uniform-gptq", seed), Budget.parse(budget)
    with bench.scratch() as out:
        plan = apply(job, tail_high(job, limit.nbytes(job.layout.parameters)), out)
        return _found(bench, job, limit, plan, out, seed)


def within(bench: Bench, recipe: str, budget: str, seed: int, overrides: tuple[str, ...] = ()) -> Found:
    """Bytes and quality of the model that a recipe makes within a budget."""
    job, limit = bench.job(recipe, seed, overrides), Budget.parse(budget)
    with bench.scratch() as out:
        plan = compress(job, limit, out)
        return _found(bench, job, limit, plan, out, seed)


def _found(bench: Bench, job: Job, limit: Budget, plan: Plan, out: Path, seed: int) -> Found:
    found = run_fields(out) | quality(bench, out, bench.original(seed))
    stored: Counter[str] = Counter()
    for name, runs in plan.weights.items():
        for run in runs:
            stored[run.precision.name] += job.layout.weights[name].rows * run.count
    nbytes = limit.nbytes(job.layout.parameters)
    return found | {
        "limit": nbytes, "used": found["nbytes"] / nbytes, "cut": plan.widths, "weights_by_format": dict(stored),
        "damage": job.recipe.measure.by if job.recipe.measure is not None else None,
        "notes": list(plan.found_by.notes),
    }  # fmt: skip


def rows(results: Results) -> list[str]:
    """A table of quality by budget and recipe."""
    found = []
    for budget, recipe in product(BUDGETS, ("uniform-gptq", TAIL, "knapsack-nopruning", "knapsack")):
        if recipe == TAIL and budget not in TAIL_BUDGETS:
            continue
        cell = results.get(f"budget/{recipe}/{budget}")
        figures = ["not run", *[""] * 5]
        if cell is not None:
            figures = [
                f"{cell['ppl@2048']:.2f}", f"{cell['kl']:.3f}", f"{100 * cell['top1']:.1f} %",
                f"{100 * cell['used']:.2f} %", cell["method"], str(len(cell["cut"])),
            ]  # fmt: skip
        found.append([budget, recipe, *figures])
    heads = ["ppl@2048", "KL", "same first choice", "bytes used", "chosen", "sub-blocks cut"]
    return table(["budget", "recipe", *heads], found, tight=True)


def draw(results: Results, path: Path) -> None:
    """Plot perplexity against the size of the weight file, one line per recipe."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for recipe, mark in zip(RECIPES, "s^o", strict=True):
        found = [results[key] for budget in BUDGETS if (key := f"budget/{recipe}/{budget}") in results]
        sizes, ppls = [cell["nbytes"] / 1e6 for cell in found], [cell["ppl@2048"] for cell in found]
        axes.plot(sizes, ppls, marker=mark, label=recipe)
    dense = results.get("dense/seed 0")
    if dense:
        label = f"original, {dense['nbytes'] / 1e6:.0f} MB: {dense['ppl@2048']:.1f}"
        axes.axhline(dense["ppl@2048"], color="grey", linestyle=":", label=label)
    axes.set(yscale="log", xlabel="weight file, MB", ylabel="ppl@2048, WikiText-2 test", title="SmolLM2-135M")
    ticks = [20, 30, 50, 100, 200, 500, 1000, 2000]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
