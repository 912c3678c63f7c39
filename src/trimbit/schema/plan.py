"""The plan: what is cut and how many bits the rest gets."""

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
    """The basis of a model's channels: Hadamard matrices, as `rotate.py` says; nothing of it is stored."""

    kind: Literal["hadamard"] = "hadamard"
    seed: int = Field(default=0, ge=0)  # of the signs of the residual stream's


class Provenance(Schema):
    """How a plan was found."""

    method: str
    recipe: dict[str, Any]  # resolved; the plan is applied by it, or was by this other one
    calibration: str  # the name of the text, or `self`
    calibration_digest: str | None = None  # of its tokens
    measurement_hash: str | None
    seed: int
    predicted_damage: float | None  # nats of KL a token, by the additive model of the search
    measured_damage: float | None  # nats of KL a token, of the whole plan on held-out calibration tokens
    nbytes: int  # of the weight files, headers included
    notes: tuple[str, ...] = ()
    content: str = ""  # in a file: key of the plan that all this was found of


class Plan(Schema):
    """What to do to one model; every search method returns one.

    `rotation` is the basis of all channels below; None: the model's own. `cuts` maps a dim to its kept original indices
    (an empty tuple drops the sub-block), in the order in which they are stored. `orders` maps a site to a permutation
    of its kept input channels: as its i-th channel it stores the kept one of number orders[site][i]. `weights` maps a
    weight to runs along its stored input channels, and `acts` a site to how its inputs are rounded, in runs of the same
    lengths; a site without is not rounded. `biases` names weights that gain a bias, `adapters` those that have a
    low-rank pair in bf16 beside them, with its rank. `kv_cache` is how keys and values are stored while the model
    generates; None: as they are.
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
        """Content key: of what is done to the model, however it was found."""
        return digest(self.model_dump(mode="json", exclude={"found_by"}))

    @property
    def widths(self) -> dict[str, int]:
        """Kept members of the dims that are cut."""
        return {dim: len(keep) for dim, keep in self.cuts.items()}

    def to_json(self) -> str:
        """The content of plan.json; it carries the content key, by which an edited plan is recognised."""
        return self.with_provenance(content=self.content).model_dump_json(indent=1) + "\n"

    def with_provenance(self, **fields: object) -> "Plan":
        """A copy with some provenance fields replaced."""
        return self.model_copy(update={"found_by": self.found_by.model_copy(update=fields)})


def load_plan(path: Path) -> Plan:
    """Read a plan. If the file was edited by hand, its recorded results are cleared.

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
