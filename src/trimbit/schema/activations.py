"""Formats for the inputs of weights, which are rounded while the model runs."""

from pydantic import Field

from trimbit.schema.base import Schema
from trimbit.schema.precision import Grouped


class ActInt(Grouped):
    """A format for the inputs of a weight, which are rounded while the model runs; nothing is stored.

    Rounding is symmetric and dynamic, with one scale for each group of each token: x ~ s c with c in
    [-2^(b-1), 2^(b-1) - 1] and s = clip max|x| / (2^(b-1) - 1).
    """

    bits: int = Field(ge=2, le=8)
    clip: float = Field(default=1.0, gt=0, le=1)  # share of a group's range; values beyond it saturate

    @property
    def name(self) -> str:
        """The short name, such as `act4g128`."""
        return f"act{self.bits}{self.suffix}"


class ActRun(Schema):
    """One format for `count` consecutive input channels of a site; groups restart at each run."""

    count: int = Field(ge=1)
    precision: ActInt | None  # None: not rounded
