"""The commands that print: show, recipes."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trimbit.cli.options import CONTEXT, AsJson, Overrides, stdout


def show(
    path: Annotated[Path, typer.Argument(help="a compressed directory")],
    context: Annotated[int, typer.Option("--context", help="tokens that the cache is counted at", min=1)] = CONTEXT,
    as_json: AsJson = False,
) -> None:
    """Print the plan: kept groups of heads and channels, the bits of each weight, bytes, also of the cache."""
    from transformers import AutoConfig

    import trimbit  # noqa: F401 - makes the config known
    from trimbit.artifact.files import PLAN_FILE, is_compressed, weight_nbytes
    from trimbit.errors import ArtifactError
    from trimbit.model.build import build_layout
    from trimbit.report.plan_table import cache_fields, cache_line, plan_rows
    from trimbit.schema.plan import load_plan

    if not is_compressed(path):
        raise ArtifactError(f"{path} is not a compressed directory")
    found = load_plan(path / PLAN_FILE)
    layout = build_layout(AutoConfig.from_pretrained(path, local_files_only=True).original())
    if weight_nbytes(path) != layout.file_nbytes(found):
        raise ArtifactError(
            f"{path}: the weight files have {weight_nbytes(path):,} bytes, the plan says "
            f"{layout.file_nbytes(found):,}: they are damaged or not the plan's; write the directory again"
        )
    rows = plan_rows(layout, found)
    if as_json:
        cache = cache_fields(layout, found, context)
        told = {"found_by": found.found_by.model_dump(mode="json"), "kv_cache": cache, "units": rows}
        typer.echo(json.dumps(told, indent=1))
        return
    table = Table(title=f"{path}: {found.found_by.method}, {layout.file_nbytes(found):,} bytes")
    for column in ("unit", "kept", "formats", "bytes", "share"):
        table.add_column(column, justify="left" if column in {"unit", "formats"} else "right")
    for row in rows:
        table.add_row(row["unit"], row["kept"], row["formats"], f"{row['nbytes']:,}", f"{100 * row['share']:.1f} %")
    stdout.print(table)
    stdout.print(cache_line(layout, found, context), highlight=False)
    for note in found.found_by.notes:
        stdout.print(note, highlight=False)


def recipes(
    name: Annotated[str | None, typer.Argument(help="one of them, or a .yaml file, to see every parameter")] = None,
    overrides: Overrides = None,
) -> None:
    """List the recipes; or print one with all that `--set` can change, and its defaults."""
    import yaml

    from trimbit.pipeline.recipes import load_recipe, names

    if name is not None:
        from trimbit.pipeline.steps import resolved_fields

        fields = resolved_fields(load_recipe(name, tuple(overrides or ())))
        typer.echo(yaml.safe_dump(fields, sort_keys=False, width=120), nl=False)
        return
    table = Table(show_header=False)
    for each in names():
        table.add_row(each, load_recipe(each).description)
    stdout.print(table)
