"""A recipe: a published method or one of ours, written as stages with parameters. Plain data."""

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
    """A stage, by the name of its module, and its parameters, which the module's `Config` checks."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)


class Calibration(Schema):
    """The number of rows of text for each use; the command line names the text. No row has two uses."""

    rows: int = Field(default=16, ge=2)  # to fit statistics, refits and quantisers
    length: int = Field(default=2048, ge=16)  # tokens in a row
    held_out: int = Field(default=4, ge=1)  # to compare whole plans and choose the best
    training: int = Field(default=0, ge=0)  # to train masks or pairs; 0: train on the fitted rows
    report: int = Field(default=4, ge=1)  # to measure the reported KL: nothing is fitted to them or chosen by them


class Measure(Schema):
    """How to find the damage of choices."""

    by: By = "predicted"  # predicted: one backward sweep through the model; measured: a forward pass for each choice
    draws: int = Field(default=1, ge=1)  # if predicted: labels drawn from the model for each token
    rows: int = Field(default=3, ge=1)  # that nothing is fitted to; `length` tokens of each are used
    length: int = Field(default=512, ge=16)
    # apply the last plans for real to choose the best of them; false: choose by estimated KL, in seconds
    apply_finalists: bool = True
    rounds: int = Field(default=1, ge=1)  # the plan of each round is the background of the next


class Recipe(Schema):
    """Everything that determines a result besides the model, the budget, the text and the seed."""

    description: str
    source: str
    calibration: Calibration = Field(default_factory=Calibration)
    space: Space | None = None
    criterion: Step | None = None  # ranks the channels and KV groups that may be cut
    prune: PruneRatio | None = None  # cut by a fixed ratio before the search
    measure: Measure | None = None
    search: Step
    quant: Step
    importance: Step | None = None  # criterion for the importance of layers, if the search asks for it
    repair: Step | None = Step(name="refit")
    lowrank: Step | None = None  # a low-rank pair for each weight of the blocks: the start of training
    tune: Step | None = None  # trains these pairs with the packed weights frozen
    rotation: Rotation | None = None  # the basis in which channels are quantised
    kv_cache: KVPrecision | None = None  # format of the KV cache during generation
    compute: Literal["bfloat16", "float32"] = "bfloat16"  # dtype of matrix products

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, as it is written next to a result."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)


def step_config(kind: type[Schema], stage: str, step: Step) -> Any:  # noqa: ANN401
    """The parameters of a stage as its module's `Config`.

    Raises:
        RecipeError: if a parameter is unknown or has a bad value.
    """
    try:
        return kind.model_validate_json(json.dumps(step.params))
    except ValidationError as err:
        raise RecipeError(f"{stage} {step.name}: {first_problem(err)}") from err
