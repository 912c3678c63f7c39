"""Recipes by name or file, with overrides from the command line."""

import copy
import json
import re
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trimbit.errors import RecipeError
from trimbit.schema.base import first_problem
from trimbit.schema.recipe import Recipe

FOLDER = Path(str(files("trimbit"))) / "recipes"


def names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, as YAML 1.2 does."""


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def _parsed(text: str) -> Any:  # noqa: ANN401
    return yaml.load(text, _Loader)


def load_recipe(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by name or file, with overrides such as `search.plans=4`.

    Raises:
        RecipeError: if there is no such recipe, or it or an override has an unknown key or a bad value.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(f"no recipe {name!r}; known are {', '.join(names())}, or give a .yaml file")
    try:
        fields = _parsed(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise RecipeError(f"{path}: not YAML: {str(err).splitlines()[0]}") from err
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of stages")
    return read_recipe(fields, path.stem, overrides)


def read_recipe(fields: dict[str, Any], name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """A recipe from its fields, with overrides; see `load_recipe`."""
    fields = copy.deepcopy(fields)
    for override in overrides:
        _override(fields, override)
    try:
        return Recipe.model_validate_json(json.dumps(fields, default=str))  # YAML dates become text
    except ValidationError as err:
        raise RecipeError(f"{name}: {first_problem(err)}") from err


def _override(fields: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise RecipeError(f"cannot read the override {text!r}: write it as stage.parameter=value")
    for part, following in pairwise(path):
        if fields.get(part) is None:
            fields[part] = {}
        if not isinstance(fields[part], dict):
            raise RecipeError(f"override {text!r}: {part} has no parameters")
        fields = fields[part]
        if "name" in fields and following != "name":  # a step: its parameters are one level down
            fields = fields.setdefault("params", {})
    try:
        fields[path[-1]] = _parsed(value)
    except yaml.YAMLError as err:
        raise RecipeError(f"override {text!r}: the value is not YAML") from err
