"""Where should damage be measured: near the lossless model, or near the budget?

Cells: three budgets by two backgrounds, choosing only bits from a small set of formats. Each compares the predicted KL
of the chosen plan with the KL measured on the whole model, made of the same candidates. The first cell of a background
measures its damage, about 20 minutes; the others take a minute or two.
Alone: `python benchmarks/run.py main.background --data DATA`
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

from harness.bench import TRAIN, Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results, table
from trimbit.measure.choices import background_of
from trimbit.measure.damage import install
from trimbit.measure.kl_probe import KLProbe
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.pipeline.flow import find_plan
from trimbit.pipeline.job import Job
from trimbit.pipeline.oracle import ModelOracle
from trimbit.pipeline.prepare import Prepared, prepare
from trimbit.schema.budget import Budget
from trimbit.schema.plan import Plan

SEEDS = (0,)
SHARED_MINUTES = 60.0  # for damage near the lossless model, and near two uniform plans
BUDGETS = ("72MB", "55MB", "45MB")
BACKGROUNDS = {"near the lossless model": "uint6g64", "uniform plan nearest the budget": "null"}
SMALL = (
    "space.formats=[uint2g64, uint3g64, uint4g64]",
    "space.embedding_formats=[uint3g64, uint4g64, uint5g64, uint6g64]",
    "measure.rows=4",
    "measure.length=256",
    "measure.apply_finalists=false",
    "search.uniform=null",
)


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each background at each budget."""
    for budget, where in product(BUDGETS, BACKGROUNDS):
        yield Cell(
            key=seeded(f"background/{where}/{budget}", seed),
            run=partial(added_up, bench, where, budget, seed),
            minutes=2, seed=seed, texts=(bench.data / TRAIN,),
        )  # fmt: skip


def added_up(bench: Bench, where: str, budget: str, seed: int) -> Found:
    """KL of the chosen plan: predicted, measured on the rows by which plans are chosen, and on those of the damage."""
    job = bench.job(
        "knapsack-nopruning", seed, (*SMALL, f"search.background={BACKGROUNDS[where]}")
    )  # fmt: skip
    plan, prepared = find_plan(job, Budget.parse(budget)).plan, prepare(job)
    with ModelOracle(job, prepared) as oracle:
        measured = oracle.estimate_kl(plan)
    return {
        "predicted": plan.found_by.predicted_damage, "measured": measured,
        "measured_on_the_same_rows": _on_damage_rows(job, prepared, plan),
    }  # fmt: skip


def _on_damage_rows(job: Job, prepared: Prepared, plan: Plan) -> float:
    """KL of the whole plan on the rows on which damage was measured."""
    assert prepared.text is not None
    assert prepared.text.damage is not None
    probe = KLProbe(InMemoryModel(job.stream), prepared.text.damage.tokens, repeated=False)
    with ModelOracle(job, prepared) as oracle:
        install(probe.whole, job.layout, oracle.candidates, background_of(plan, job.layout))
    return probe.damage(None)


def rows(results: Results) -> list[str]:
    """A table of predicted and measured KL, by budget and background."""
    found = []
    for budget, where in product(BUDGETS, BACKGROUNDS):
        cell = results.get(f"background/{where}/{budget}")
        figures = [f"{cell['predicted']:.3f}", f"{cell['measured']:.3f}"] if cell else ["not run", ""]
        found.append([budget, where, *figures])
    return table(["budget", "damage measured", "predicted KL", "KL of the whole"], found, tight=True)
