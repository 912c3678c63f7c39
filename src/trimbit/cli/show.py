"""The command that prints a compressed directory: show."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimbit.cli.console import print_line, print_table
from trimbit.cli.options import CONTEXT, AsJson

if TYPE_CHECKING:
    from trimbit.schema.plan import Plan
    from trimbit.schema.run import Run


def show(
    path: Annotated[Path, typer.Argument(help="a compressed directory")],
    context: Annotated[int, typer.Option("--context", help="tokens for the size of the KV cache", min=1)] = CONTEXT,
    as_json: AsJson = False,
) -> None:
    """Print what a directory holds: size, KL, kept heads and channels, formats, plans tried, stages, KV cache."""
    run, plan = read_result(path)
    if as_json:
        typer.echo(json.dumps(fields(run, context), indent=1))
        return
    _print_result(path, run, plan, context)


def read_result(path: Path) -> "tuple[Run, Plan]":
    """Read `run.json` and `plan.json` of a compressed directory; check them against each other and the weight files.

    Raises:
        ArtifactError: if it is not a compressed directory, a file is missing or damaged, or the plan was edited.
    """
    from trimbit.artifact.files import PLAN_FILE, is_compressed, weight_nbytes
    from trimbit.errors import ArtifactError
    from trimbit.schema.base import parse_json
    from trimbit.schema.plan import load_plan
    from trimbit.schema.run import RUN_FILE, Run

    if not is_compressed(path):
        raise ArtifactError(f"{path} is not a compressed directory")
    run, plan = parse_json(Run, path / RUN_FILE, ArtifactError), load_plan(path / PLAN_FILE)
    if plan.content != run.plan:
        raise ArtifactError(
            f"{path / PLAN_FILE} was edited: its content key is {plan.content}, but {run.plan} made the weights; "
            "restore the file, or write a new directory with `trimbit apply`"
        )
    if weight_nbytes(path) != run.nbytes:
        raise ArtifactError(
            f"{path}: the weight files have {weight_nbytes(path):,} bytes, but {RUN_FILE} says {run.nbytes:,}: "
            "they are damaged or from another run; write the directory again"
        )
    return run, plan


def fields(run: "Run", context: int) -> dict[str, Any]:
    """What `--json` prints: run.json and the sizes derived from it."""
    cache = run.kv_cache
    return run.model_dump(mode="json") | {
        "bf16_nbytes": 2 * run.parameters,
        "bits_per_parameter": 8 * run.nbytes / run.parameters,
        "kv_cache": cache.model_dump(mode="json")
        | {"context": context, "nbytes": cache.nbytes(context), "bf16_nbytes": cache.bf16_nbytes(context)},
    }


def _print_result(path: Path, run: "Run", plan: "Plan", context: int) -> None:
    from trimbit.report import run_tables as tables

    print_line(f"{path}: {tables.headline(run.parameters, run.nbytes, run.report_kl)}")
    print_line(f"{tables.budget_line(run.nbytes, run.budget_nbytes if run.budget else None)}; {run.method}")
    for table in (tables.units_table(run), tables.tried_table(run), tables.stages_table(run)):
        if table is not None:
            print_table(table)
    print_line(tables.cache_line(run.kv_cache, context))
    for note in plan.found_by.notes:
        print_line(note)
