"""The record of a job, as `run.json`."""

import platform
from importlib.metadata import version

from trimbit.jobs.hardware import hardware
from trimbit.model.resolved import Resolved
from trimbit.pipeline.job import Job
from trimbit.pipeline.result import Result
from trimbit.pipeline.text import Text
from trimbit.report.plan_table import cache_record, unit_rows
from trimbit.schema.base import digest
from trimbit.schema.found import Tried
from trimbit.schema.plan import Plan
from trimbit.schema.run import Run, TextRecord, TrainingRecord, TriedPlan

PACKAGES = ("trimbit", "torch", "transformers")


def run_record(job: Job, result: Result, plan: Plan, resolved: Resolved) -> Run:
    """The record of a finished job."""
    measured = result.applied.measured
    return Run(
        versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        hardware=hardware(), model=job.model, parameters=job.layout.parameters, seed=job.seed,
        text=_text(job, result.text), budget=str(result.budget) if result.budget else None,
        budget_nbytes=result.budget_nbytes, nbytes=plan.found_by.nbytes, plan=plan.content, method=plan.found_by.method,
        predicted_kl=plan.found_by.predicted_damage, chosen_kl=measured.choose if measured else None,
        report_kl=plan.found_by.measured_damage, gap=result.found.gap,
        corrections=result.found.corrections, tried=tuple(map(_tried, result.found.tried)),
        training=tuple(_training(result)), stages=tuple(job.runner.records.values()),
        units=unit_rows(resolved), kv_cache=cache_record(job.layout, resolved),
    )  # fmt: skip


def _text(job: Job, text: Text | None) -> TextRecord | None:
    if text is None:
        return None
    want = job.recipe.calibration
    return TextRecord(
        name=text.fit.name, digest=digest(text.digests), length=want.length, fit_rows=len(text.fit.tokens),
        damage_rows=len(text.damage.tokens) if text.damage else 0,
        choose_rows=len(text.choose.tokens), train_rows=want.training, report_rows=len(text.report.tokens),
    )  # fmt: skip


def _tried(one: Tried) -> TriedPlan:
    found, outcome = one.plan.found_by, one.outcome
    estimated = one.estimated_kl if outcome is None else outcome.kl
    return TriedPlan(
        name=found.method, plan=one.plan.content, nbytes=found.nbytes, predicted_kl=found.predicted_damage,
        estimated_kl=estimated, applied_kl=one.applied_kl, nll=outcome.nll if outcome else None,
        accuracy=outcome.accuracy if outcome else None, accuracy_stderr=outcome.stderr if outcome else None,
    )  # fmt: skip


def _training(result: Result) -> list[TrainingRecord]:
    found, curve, recovered = [], result.found.curve, result.recovered
    if curve:
        losses = [step["loss"] for step in curve]
        found.append(TrainingRecord(what="masks", steps=len(curve), first_loss=losses[0], last_loss=losses[-1]))
    if recovered is not None:
        found.append(
            TrainingRecord(
                what="pairs", steps=len(recovered.losses), first_loss=recovered.losses[0],
                last_loss=recovered.losses[-1], trained_nbytes=recovered.trained_nbytes,
                optimizer_nbytes=recovered.optimizer_nbytes,
            )
        )  # fmt: skip
    return found
