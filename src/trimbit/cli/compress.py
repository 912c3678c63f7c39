"""The commands that search and apply: compress, plan, apply."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimbit.cli.console import print_line, print_table
from trimbit.cli.options import (
    CONTEXT,
    BudgetText,
    Calibration,
    Device,
    DryRun,
    Model,
    Out,
    Overrides,
    RecipeName,
    Seed,
)  # fmt: skip
from trimbit.cli.progress import reporter

if TYPE_CHECKING:
    from trimbit.model.layout import Layout
    from trimbit.pipeline.job import Job
    from trimbit.schema.budget import Budget
    from trimbit.schema.plan import Plan
    from trimbit.schema.recipe import Recipe


def compress(
    model: Model, out: Out, budget_text: BudgetText = None, recipe: RecipeName = "knapsack",
    calibration: Calibration = "self", overrides: Overrides = None, seed: Seed = 0, device: Device = "auto",
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Find the best model within a budget and write it."""
    from trimbit.artifact.files import require_absent
    from trimbit.pipeline import flow
    from trimbit.pipeline.recipes import load_recipe
    from trimbit.schema.budget import Budget

    budget = Budget.parse(budget_text) if budget_text is not None else None
    require_absent(out)
    job = _job(model, load_recipe(recipe, tuple(overrides or ())), calibration, seed, device)
    if dry_run:
        _estimate(job, budget)
        return
    found = flow.compress(job, budget, out)
    print_summary(job.layout, found, budget.nbytes(job.layout.parameters) if budget else None, out)


def plan(
    model: Model, out: Out, budget_text: BudgetText = None, recipe: RecipeName = "knapsack",
    calibration: Calibration = "self", overrides: Overrides = None, seed: Seed = 0, device: Device = "auto",
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Find the best plan within a budget and write it as JSON."""
    from trimbit.artifact.files import require_absent
    from trimbit.jobs.cache import save_atomically
    from trimbit.pipeline import flow
    from trimbit.pipeline.recipes import load_recipe
    from trimbit.schema.budget import Budget

    budget = Budget.parse(budget_text) if budget_text is not None else None
    require_absent(out, file=True)
    job = _job(model, load_recipe(recipe, tuple(overrides or ())), calibration, seed, device)
    if dry_run:
        _estimate(job, budget)
        return
    found = flow.find_plan(job, budget).plan
    save_atomically(out, lambda beside: beside.write_text(found.to_json(), encoding="utf-8"))
    print_summary(job.layout, found, budget.nbytes(job.layout.parameters) if budget else None, out)


def apply_command(
    model: Model, plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan.json")], out: Out,
    recipe: Annotated[str | None, typer.Option("--recipe", help="default: the recipe that found the plan")] = None,
    calibration: Annotated[str | None, typer.Option("--calibration", help="`self`, `builtin`, or a text file")] = None,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option("--seed", help="default: the seed with which the plan was found")] = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Apply a plan to a model with the recipe that found the plan, and write the compressed directory."""
    from trimbit.artifact.files import require_absent
    from trimbit.errors import PlanError
    from trimbit.pipeline import flow
    from trimbit.pipeline.recipes import load_recipe, read_recipe
    from trimbit.pipeline.text import NAMED
    from trimbit.schema.plan import load_plan

    require_absent(out)
    found, own = load_plan(plan_file), tuple(overrides or ())
    by = found.found_by
    resolved = read_recipe(by.recipe, str(plan_file), own) if recipe is None else load_recipe(recipe, own)
    named = by.calibration if by.calibration in NAMED else NAMED[0]
    job = _job(model, resolved, calibration or named, by.seed if seed is None else seed, device)
    if calibration is None and by.calibration not in NAMED and job.needs_text:
        raise PlanError(f"the plan was found on {by.calibration}; give that file or another text (--calibration)")
    written = flow.apply(job, found, out)
    print_summary(job.layout, written, None, out)


def _job(model: Path, recipe: "Recipe", calibration: str, seed: int, device: str) -> "Job":
    from trimbit.pipeline.preflight import open_job

    return open_job(model, recipe, calibration=calibration, seed=seed, reporter=reporter(), device=device)


def print_summary(layout: "Layout", plan: "Plan", budget_nbytes: int | None, out: Path) -> None:
    """Print what was decided, in a few lines."""
    from trimbit.model.resolved import resolve
    from trimbit.report.plan_table import cache_record
    from trimbit.report.run_tables import budget_line, cache_line, headline

    found, resolved = plan.found_by, resolve(plan, layout)
    nbytes = resolved.file_nbytes
    cut = sum(unit.width is not None and unit.width < unit.origin.size for unit in resolved.units.values())
    print_line(f"{out}: {budget_line(nbytes, budget_nbytes)}")
    print_line(headline(layout.parameters, nbytes, found.measured_damage))
    print_line(found.method + (f"; {cut} of {2 * layout.blocks} sub-blocks cut" if cut else ""))
    if plan.kv_cache is not None:
        print_line(cache_line(cache_record(layout, resolved), CONTEXT))
    for note in found.notes:
        print_line(note)


def _estimate(job: "Job", budget: "Budget | None") -> None:
    """Print what a run would take, stage by stage."""
    from trimbit.pipeline.estimate.dry_run import estimate
    from trimbit.report.estimate_table import estimate_lines, estimate_table

    found = estimate(job, budget)
    for line in estimate_lines(found):
        print_line(line)
    print_table(estimate_table(found))
    print_line("dry run: nothing was written")
