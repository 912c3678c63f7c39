"""Damage of each choice of each unit, measured or predicted: plain data, stored, and solved again for any budget."""

from typing import Literal

from trimbit.schema.base import Schema
from trimbit.schema.plan import ModelRef
from trimbit.schema.precision import Precision

By = Literal["measured", "predicted"]


class FormatDamage(Schema):
    """Change of the whole model's KL when one site's weights take a format, all else as in the background."""

    site: str
    precision: Precision
    damage: float
    by: By = "measured"


class WidthDamage(Schema):
    """Change of the whole model's KL when a dim keeps `width` channels or KV groups, all else as in the background."""

    dim: str
    width: int
    damage: float
    by: By = "measured"


class Background(Schema):
    """The plan around which damage is measured: widths of the cut dims, and a format for each site.

    In a plan that is tried as a whole a weight may have a format of its own, under its own name.
    """

    widths: dict[str, int]
    formats: dict[str, Precision]


class Measurements(Schema):
    """Damage of every choice in nats of KL a token, against the dense model."""

    schema_version: Literal[1] = 1
    model: ModelRef
    criterion: Literal["kl"] = "kl"
    data_digest: str
    seed: int
    background: Background
    background_damage: float
    rankings: dict[str, tuple[int, ...]]  # dim -> indices, the one to keep longest first
    formats: tuple[FormatDamage, ...]
    widths: tuple[WidthDamage, ...]
