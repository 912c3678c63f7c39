"""A recipe: a published method, or one of ours, as stages with their parameters. Plain data."""

import json
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from trimbit.errors import RecipeError
from trimbit.schema.base import Schema, first_problem
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.measurements import By
from trimbit.schema.plan import Rotation
from trimbit.schema.space import PruneRatio, Space


class Step(Schema):
    """A stage by the name of its module; the module's own `Config` checks the parameters."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)


class Calibration(Schema):
    """How many rows of text there are for each use; the command line says which text. No row has two uses."""

    rows: int = Field(default=16, ge=2)  # that statistics, refits and quantisers are fitted to
    length: int = Field(default=2048, ge=16)
    held_out: int = Field(default=4, ge=1)  # that whole plans are compared on, and chosen by
    training: int = Field(default=0, ge=0)  # that masks or pairs are trained on; 0: the fitted rows
    report: int = Field(default=4, ge=1)  # that nothing is fitted to or chosen by: the KL that is reported


class Measure(Schema):
    """How the damage of choices is found."""

    by: By = "measured"  # by a forward pass for each choice, or predicted by one sweep back through the model
    draws: int = Field(default=4, ge=1)  # where it is predicted: labels that the model draws for each token
    rows: int = Field(default=3, ge=1)  # rows that nothing is fitted to; `length` tokens of each are used
    length: int = Field(default=512, ge=16)
    # whether the last plans are applied for real to choose among them; false: a plan in seconds
    apply_finalists: bool = True
    rounds: int = Field(default=1, ge=1)  # each round measures in the background of the plan before it


class Recipe(Schema):
    """Everything that decides a result beside the model, the budget, the text and the seed."""

    description: str
    source: str
    calibration: Calibration = Field(default_factory=Calibration)
    space: Space | None = None
    criterion: Step | None = None  # ranks what may be cut
    prune: PruneRatio | None = None  # a ratio, before the search
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


def step_config(kind: type[Schema], stage: str, step: Step) -> Any:  # noqa: ANN401
    """The configuration of a stage, checked by its module's `Config`.

    Raises:
        RecipeError: if a parameter is unknown or has a bad value.
    """
    try:
        return kind.model_validate_json(json.dumps(step.params))
    except ValidationError as err:
        raise RecipeError(f"{stage} {step.name}: {first_problem(err)}") from err
