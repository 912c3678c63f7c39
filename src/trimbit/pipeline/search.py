"""The search, as a stage: from a budget to a plan within it."""

import json
import logging
from pathlib import Path

from trimbit.errors import BudgetError
from trimbit.jobs.checked import load_json, save_json
from trimbit.jobs.stages import Stage, Work
from trimbit.model.forward.compute import native
from trimbit.model.layout import Layout
from trimbit.model.resolved import resolve
from trimbit.pipeline.job import Job
from trimbit.pipeline.keys import PlanKey
from trimbit.pipeline.oracle import ModelOracle, problem_of
from trimbit.pipeline.prepare import Prepared
from trimbit.schema.base import digest
from trimbit.schema.found import Found
from trimbit.schema.plan import Plan
from trimbit.search.two_formats.config import MaskedSearch

log = logging.getLogger(__name__)
WIDE_GAP = 0.01  # ours: a larger gap is worth a warning
IRRELEVANT = {"description", "source", "search"}  # no effect on the plan, or (search) a separate field of the key


def search(job: Job, prepared: Prepared, budget_nbytes: int) -> Found:
    """Find the best plan within a budget; the result is cached.

    Raises:
        BudgetError: if the budget is not feasible.
    """
    return job.runner.run(search_stage(job, prepared, budget_nbytes))


def search_stage(job: Job, prepared: Prepared, budget_nbytes: int) -> Stage[Found]:
    """The stage that finds the plan."""

    def make(work: Work) -> None:
        with ModelOracle(job, prepared) as oracle:
            problem = problem_of(job, budget_nbytes, oracle, work.folder)
            found = job.steps.method.search(problem, job.steps.search)
        require_within(found.plan, job.layout, budget_nbytes)
        if found.gap is not None and found.gap > WIDE_GAP:
            log.warning(
                "the solver stopped early: by its own objective a plan up to %.1f %% better may exist", 100 * found.gap
            )
        save_json(work.folder / "found.json", found.model_dump(mode="json"))

    def load(folder: Path) -> Found:
        return Found.model_validate_json(json.dumps(load_json(folder / "found.json")))

    return Stage(key=_key(job, prepared, budget_nbytes), title="search", make=make, load=load)


def require_within(plan: Plan, layout: Layout, budget_nbytes: int) -> None:
    """Enforce the budget, whatever the search method does.

    Raises:
        BudgetError: if the plan's files are larger than the budget.
    """
    nbytes = resolve(plan, layout).file_nbytes
    if nbytes > budget_nbytes:
        raise BudgetError(
            f"the search found a plan of {nbytes:,} bytes for a budget of {budget_nbytes:,}: please report this; "
            f"another recipe, or --budget {nbytes}B, will do meanwhile"
        )


def _key(job: Job, prepared: Prepared, budget_nbytes: int) -> PlanKey:
    config, recipe = job.steps.search, job.recipe.model_dump(mode="json", exclude=IRRELEVANT)
    device = "cpu"
    if isinstance(config, MaskedSearch):
        kind = job.device.type
        graphs = " graphs" if config.cuda_graphs(kind) else ""
        device = f"{kind} {native(job.compute, kind)}{graphs}"
    return PlanKey(
        weights=job.model.weights_hash, config=job.model.config_hash,
        text=prepared.text.digests if prepared.text else [], recipe=recipe,
        search={"name": job.recipe.search.name, **job.steps.method.fields(config)},
        rankings=digest(dict(prepared.rankings)), budget_nbytes=budget_nbytes, seed=job.seed, device=device,
    )  # fmt: skip
