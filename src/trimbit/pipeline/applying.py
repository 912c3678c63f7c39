"""Applying plans for real: a stage for each plan, which leaves a compressed directory in the cache."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from trimbit.artifact.writer import Writer
from trimbit.jobs.checked import load_json, save_json
from trimbit.jobs.stages import Stage, Work
from trimbit.pipeline.job import Job, plain
from trimbit.pipeline.keys import AppliedKey
from trimbit.pipeline.prepare import Prepared
from trimbit.pipeline.teacher import teacher
from trimbit.schema.plan import Plan
from trimbit.search.problem import Measured
from trimbit.transform.apply import apply_plan

MEASURED_FILE = "measured.json"


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A compressed directory and its measured KL; None if the recipe reads no text."""

    folder: Path
    measured: Measured | None


def applied_stage(job: Job, prepared: Prepared, plan: Plan, title: str) -> Stage[Applied]:
    """The stage that applies a plan."""
    text, recipe = prepared.text, job.recipe
    key = AppliedKey(
        plan=plan.model_dump(mode="json", exclude={"found_by", "kv_cache"}),
        fit=text.fit.digest if text and prepared.stats is not None else None,
        choose=text.choose.digest if text else None,
        report=text.report.digest if text else None,
        compute=recipe.compute,
        quant=plain(recipe.quant),
        repair=plain(recipe.repair),
        lowrank=plain(recipe.lowrank),
        seed=job.seed if job.rank else None,
    )

    def make(work: Work) -> None:
        writer = Writer(work.folder, job.layout, plan)
        fits = text is not None and prepared.stats is not None
        tokens = text.fit.tokens if text is not None and fits else torch.zeros(1, 2, dtype=torch.long)
        held_out = torch.cat([text.choose.tokens, text.report.tokens]) if text is not None else None
        original = teacher(job, held_out) if held_out is not None else None
        kls = apply_plan(
            job.stream, plan, tokens, job.compressor, job.steps.repair, prepared.stats, writer, work.progress,
            held_out, original,
        )  # fmt: skip
        writer.finish()
        measured = [fmean(kls[: len(text.choose.tokens)]), fmean(kls[len(text.choose.tokens) :])] if text else None
        save_json(work.folder / MEASURED_FILE, measured)

    def load(folder: Path) -> Applied:
        found = load_json(folder / MEASURED_FILE)
        return Applied(folder=folder, measured=Measured(*found) if found else None)

    return Stage(key=key, title=title, make=make, load=load)


def applied(job: Job, prepared: Prepared, plan: Plan, title: str = "pruning, refit, quantisation") -> Applied:
    """Apply a plan, unless the result is cached."""
    return job.runner.run(applied_stage(job, prepared, plan, title))
