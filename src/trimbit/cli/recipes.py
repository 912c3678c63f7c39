"""The command that prints recipes."""

from typing import Annotated

import typer

from trimbit.cli.console import print_pairs
from trimbit.cli.options import Overrides


def recipes(
    name: Annotated[str | None, typer.Argument(help="one of them, or a .yaml file, to see every parameter")] = None,
    overrides: Overrides = None,
) -> None:
    """List the recipes; or print one with all that `--set` can change, and its defaults."""
    from trimbit.pipeline.recipes import load_recipe, names

    if name is None:
        print_pairs((each, load_recipe(each).description) for each in names())
        return
    import yaml

    from trimbit.pipeline.steps import resolved_fields  # with torch: the methods know their parameters

    fields = resolved_fields(load_recipe(name, tuple(overrides or ())))
    typer.echo(yaml.safe_dump(fields, sort_keys=False, width=120), nl=False)
