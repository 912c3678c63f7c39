"""The part of a plan that the runtime needs; stored in config.json."""

from pydantic import Field

from trimbit.schema.activations import ActRun
from trimbit.schema.base import Schema
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import Rotation
from trimbit.schema.precision import Run


class Structure(Schema):
    """The part of a plan that the runtime needs, without index lists; the fields are as in `Plan`.

    `gathers` names the sites whose order is stored as a tensor; all other orders are folded into the weights.
    """

    widths: dict[str, int]  # of the cut dims
    weights: dict[str, tuple[Run, ...]]
    biases: tuple[str, ...] = ()
    adapters: dict[str, int] = Field(default_factory=dict)
    gathers: tuple[str, ...] = ()
    acts: dict[str, tuple[ActRun, ...]] = Field(default_factory=dict)
    rotation: Rotation | None = None
    kv_cache: KVPrecision | None = None
