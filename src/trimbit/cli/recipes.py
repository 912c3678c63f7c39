"""The command that prints recipes."""

from typing import Annotated

import typer

from trimbit.cli.console import print_pairs
from trimbit.cli.options import Overrides


def recipes(
    name: Annotated[str | None, typer.Argument(help="the recipe to print: its name, or a .yaml file")] = None,
    overrides: Overrides = None,
    defaults: Annotated[
        bool, typer.Option("--all", help="print every parameter that --set can change; this loads PyTorch")
    ] = False,
) -> None:
    """List the recipes, or print one: as it is written, or with all that `--set` can change."""
    import yaml

    from trimbit.pipeline.recipes import load_recipe, names

    if name is None:
        print_pairs((each, load_recipe(each).description) for each in names())
        return
    recipe = load_recipe(name, tuple(overrides or ()))
    fields = recipe.model_dump(mode="json", exclude_unset=True)
    if defaults:
        from trimbit.pipeline.steps import resolved_fields  # the methods know their parameters

        fields = resolved_fields(recipe)
    typer.echo(yaml.safe_dump(fields, sort_keys=False, width=120), nl=False)
