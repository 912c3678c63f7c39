"""The plan: what is cut, and the formats of the rest."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trimbit.errors import PlanError
from trimbit.schema.activations import ActRun
from trimbit.schema.base import Schema, digest, parse_json
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.precision import Run


class ModelRef(Schema):
    """The original model that a plan belongs to."""

    id: str
    config_hash: str
    weights_hash: str


class Rotation(Schema):
    """The basis of a model's channels: Hadamard matrices, as in `transform/rotate.py`; the matrices are not stored."""

    kind: Literal["hadamard"] = "hadamard"
    seed: int = Field(default=0, ge=0)  # of the random signs of the residual stream's matrix


class Provenance(Schema):
    """How a plan was found."""

    method: str
    recipe: dict[str, Any]  # resolved; the recipe that found the plan, or, once it was applied, the one that applied it
    calibration: str  # name of the text, or `self`
    calibration_digest: str | None = None  # of its tokens
    measurement_hash: str | None
    seed: int
    predicted_damage: float | None  # nats of KL a token, by the additive model of the search
    measured_damage: float | None  # nats of KL a token, of the whole model on the report rows
    nbytes: int  # of the weight files, headers included
    notes: tuple[str, ...] = ()
    content: str = ""  # in a file: content key of the plan that these fields describe


class Plan(Schema):
    """The changes to make to one model; every search method returns a plan.

    Attributes:
        rotation: the basis of all channels below; None: the model's own basis.
        cuts: dim -> its kept original indices, in stored order; an empty tuple drops the sub-block.
        orders: site -> a permutation of its kept input channels; stored channel i is kept channel orders[site][i].
        weights: weight -> its runs, along its stored input channels.
        acts: site -> formats of its inputs, in runs as long as those of its weights; other inputs are not rounded.
        biases: weights that gain a bias.
        adapters: weight -> rank of its low-rank pair, which is stored in bf16.
        kv_cache: format of the KV cache; None: keys and values are not quantised.
    """

    schema_version: Literal[1] = 1
    model: ModelRef
    rotation: Rotation | None = None
    cuts: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    orders: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    weights: dict[str, tuple[Run, ...]]
    acts: dict[str, tuple[ActRun, ...]] = Field(default_factory=dict)
    biases: tuple[str, ...] = ()
    adapters: dict[str, int] = Field(default_factory=dict)
    kv_cache: KVPrecision | None = None
    found_by: Provenance

    @property
    def content(self) -> str:
        """Content key of all that the plan does to the model; provenance does not count."""
        return digest(self.model_dump(mode="json", exclude={"found_by"}))

    @property
    def widths(self) -> dict[str, int]:
        """The number of kept members of each cut dim."""
        return {dim: len(keep) for dim, keep in self.cuts.items()}

    def to_json(self) -> str:
        """The text of plan.json, with the content key, which shows if the file was edited later."""
        return self.with_provenance(content=self.content).model_dump_json(indent=1) + "\n"

    def with_provenance(self, **fields: object) -> "Plan":
        """A copy with some provenance fields replaced."""
        return self.model_copy(update={"found_by": self.found_by.model_copy(update=fields)})


def load_plan(path: Path) -> Plan:
    """Read a plan; if the file was edited by hand, drop its recorded results.

    Raises:
        PlanError: if the file is missing, is not JSON, or has an unknown key, type or schema version.
    """
    plan = parse_json(Plan, path, PlanError)
    same, plan = plan.found_by.content == plan.content, plan.with_provenance(content="")
    if same:
        return plan
    return plan.with_provenance(
        method=f"edited, once: {plan.found_by.method}", predicted_damage=None, measured_damage=None, notes=()
    )
