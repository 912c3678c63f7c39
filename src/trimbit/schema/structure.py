"""What the runtime needs of a plan; it is stored in config.json."""

from pydantic import Field

from trimbit.schema.activations import ActRun
from trimbit.schema.base import Schema
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import Rotation
from trimbit.schema.precision import Run


class Structure(Schema):
    """What the runtime needs of a plan, without the index lists.

    Of the orders it names the sites whose order is stored as a tensor; the others are folded into the weights.
    """

    widths: dict[str, int]  # of the dims that are cut
    weights: dict[str, tuple[Run, ...]]
    biases: tuple[str, ...] = ()
    adapters: dict[str, int] = Field(default_factory=dict)
    gathers: tuple[str, ...] = ()
    acts: dict[str, tuple[ActRun, ...]] = Field(default_factory=dict)
    rotation: Rotation | None = None
    kv_cache: KVPrecision | None = None
