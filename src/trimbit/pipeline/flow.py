"""The flow: model → calibrate → measure → search → transform → recover → artifact; each stage is cached by content."""

import logging
from pathlib import Path

from trimbit.artifact.writer import appearing
from trimbit.model.resolved import resolve
from trimbit.pipeline.applying import applied
from trimbit.pipeline.job import Job
from trimbit.pipeline.preflight import preflight, require_own, require_training
from trimbit.pipeline.prepare import Prepared, prepare
from trimbit.pipeline.recovering import config_of, pairs_stage, with_recovered
from trimbit.pipeline.result import Result
from trimbit.pipeline.search import search
from trimbit.pipeline.writing import write
from trimbit.schema.budget import Budget
from trimbit.schema.found import Found
from trimbit.schema.plan import Plan

log = logging.getLogger(__name__)


def compress(job: Job, budget: Budget | None, out: Path) -> Plan:
    """Find the best plan within a budget, apply it, and write the compressed directory; returns its plan."""
    budget_nbytes = preflight(job, budget, out)  # everything that is needed is there
    prepared = prepare(job)  # text, moments of every site, which channels go first
    found = search(job, prepared, budget_nbytes)  # the plan, from the damage of choices
    return finish(job, prepared, found, budget, budget_nbytes, out)


def find_plan(job: Job, budget: Budget | None) -> Found:
    """Find the best plan within a budget; without one, of the recipe's default size."""
    budget_nbytes = preflight(job, budget)
    return search(job, prepare(job), budget_nbytes)


def apply(job: Job, plan: Plan, out: Path) -> Plan:
    """Apply a plan and write the compressed directory; returns the plan that it holds.

    Raises:
        PlanError: if the plan belongs to another model, or the recipe cannot apply it.
    """
    require_own(job, plan)
    require_training(job)
    prepared, own = prepare(job), plan.found_by.calibration_digest
    if None not in {own, prepared.digest} and own != prepared.digest:
        log.warning(
            "the plan was found on another text than %s: it is fitted and measured on this one", job.calibration
        )
    return finish(job, prepared, Found(plan=plan), None, resolve(plan, job.layout).file_nbytes, out)


def finish(
    job: Job, prepared: Prepared, found: Found, budget: Budget | None, budget_nbytes: int, out: Path
) -> Plan:  # fmt: skip
    """Apply a found plan, train its low-rank pairs, and write the directory, whole or not at all."""
    with appearing(out) as folder:
        own = applied(job, prepared, found.plan)
        recovered, kl = None, None
        if job.steps.tune is not None:
            recovered = job.runner.run(pairs_stage(job, prepared, found.plan, own, config_of(job)))
            assert prepared.text is not None, "recovery reads text"
            kl = with_recovered(job, prepared.text.report.tokens, own, recovered)[1].kl
        result = Result(
            found=found, applied=own, text=prepared.text, recovered=recovered, recovered_kl=kl, budget=budget,
            budget_nbytes=budget_nbytes,
        )  # fmt: skip
        return write(job, result, folder)
