"""Damage of each choice of each unit, measured or predicted; once stored, it serves the search at any budget."""

from typing import Literal

from trimbit.schema.base import Schema
from trimbit.schema.plan import ModelRef
from trimbit.schema.precision import Precision

By = Literal["measured", "predicted"]


class FormatDamage(Schema):
    """Change of the whole model's KL if one site's weights take a format and all else is as in the background."""

    site: str
    precision: Precision
    damage: float
    by: By = "measured"


class WidthDamage(Schema):
    """Change of the whole model's KL if a dim keeps `width` channels or KV groups, all else as in the background."""

    dim: str
    width: int
    damage: float
    by: By = "measured"


class Background(Schema):
    """The plan in which single choices are changed to measure their damage: widths of cut dims, and formats by site.

    If whole plans are tried, `formats` may also name single weights.
    """

    widths: dict[str, int]
    formats: dict[str, Precision]


class Anchor(Schema):
    """A choice that was both predicted and measured."""

    name: str
    predicted: float
    measured: float


class Correction(Schema):
    """The factor by which the predicted damage of a kind of choices was multiplied, and what it follows from."""

    kind: str
    factor: float
    anchors: tuple[Anchor, ...]


class Measurements(Schema):
    """Damage of every choice: KL to the dense model in nats a token."""

    schema_version: Literal[1] = 1
    model: ModelRef
    criterion: Literal["kl"] = "kl"
    data_digest: str
    seed: int
    background: Background
    background_damage: float
    rankings: dict[str, tuple[int, ...]]  # dim -> indices, the most important first
    formats: tuple[FormatDamage, ...]
    widths: tuple[WidthDamage, ...]
    corrections: tuple[Correction, ...] = ()  # of predicted damage
