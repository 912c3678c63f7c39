"""A recipe: a published method, or one of ours, as stages with their parameters. Plain data, read from YAML."""

import copy
import json
import re
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from trimbit.errors import RecipeError
from trimbit.measurements import Prune, Space
from trimbit.plan import Rotation, first_problem
from trimbit.precision import Data, KVPrecision


class Step(Data):
    """A stage by the name of its module; the module's own `Config` checks the parameters."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)


class Calibration(Data):
    """How much text the statistics are taken from; the command line says which."""

    rows: int = Field(default=16, ge=2)
    length: int = Field(default=2048, ge=16)
    # further rows, that nothing is fitted to: whole plans are judged on them, and a search may choose by that
    held_out: int = Field(default=4, ge=1)
    training: int = Field(default=0, ge=0)  # further rows, to train masks or pairs on; 0: the calibration rows


class Measure(Data):
    """How damage is measured."""

    rows: int = Field(default=3, ge=1)  # of the calibration rows, cut to `length` tokens
    length: int = Field(default=512, ge=16)
    trials: bool = True  # whether the last plans are applied for real to choose among them; false: a plan in seconds
    rounds: int = Field(default=1, ge=1)  # each round measures in the background of the plan before it


class Recipe(Data):
    """Everything that decides a result beside the model, the budget, the text and the seed."""

    description: str
    source: str
    calibration: Calibration = Field(default_factory=Calibration)
    space: Space | None = None
    criterion: Step | None = None  # ranks what may be cut
    prune: Prune | None = None  # a ratio, before the search
    measure: Measure | None = None
    search: Step
    quant: Step
    importance: Step | None = None  # of layers to the task, for a search that asks for it
    repair: Step | None = Step(name="refit")
    lowrank: Step | None = None  # a pair beside each weight of the blocks, where training starts
    tune: Step | None = None  # trains these pairs, the packed weights frozen
    rotation: Rotation | None = None  # the basis that channels are quantised in
    kv_cache: KVPrecision | None = None  # how a plan's model stores keys and values while it generates
    compute: Literal["bfloat16", "float32"] = "bfloat16"  # of matrix products

    def to_yaml(self) -> str:
        """The resolved recipe, as it is written beside a result."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


def folders() -> list[Path]:
    """Where named recipes lie: in the package, or beside it in a source tree."""
    package = Path(str(files("trimbit")))
    return [folder for folder in (package / "recipes", package.parent.parent / "recipes") if folder.is_dir()]


def names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted({path.stem for folder in folders() for path in folder.glob("*.yaml")})


class _Loader(yaml.SafeLoader):
    """Takes 1e-5 for a number, as YAML 1.2 does."""


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def _parsed(text: str) -> Any:  # noqa: ANN401
    return yaml.load(text, _Loader)


def load_recipe(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by name or file, with overrides such as `search.pruning_costs=[1, 2]`.

    Raises:
        RecipeError: if there is none, or it or an override has an unknown key or a bad value.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = next((folder / f"{name}.yaml" for folder in folders() if (folder / f"{name}.yaml").exists()), path)
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
        return Recipe.model_validate_json(json.dumps(fields, default=str))  # a date, which YAML knows, is text
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


def step_config(kind: type[Data], stage: str, step: Step) -> Any:  # noqa: ANN401
    """The configuration of a stage, checked by its module's `Config`.

    Raises:
        RecipeError: if a parameter is unknown or has a bad value.
    """
    try:
        return kind.model_validate_json(json.dumps(step.params))
    except ValidationError as err:
        raise RecipeError(f"{stage} {step.name}: {first_problem(err)}") from err
