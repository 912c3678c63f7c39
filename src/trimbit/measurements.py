"""Measured damage of each choice of each unit: plain data, stored, and solved again for any budget."""

from typing import Literal

from trimbit.plan import ModelRef
from trimbit.precision import Data, Precision


class Space(Data):
    """What a search may choose from."""

    formats: tuple[Precision, ...]  # of every weight of the blocks, one a site
    table_formats: tuple[Precision, ...]  # of the embedding and the head
    widths: tuple[float, ...] = (1.0,)  # shares of a feed-forward sub-block's channels; 0 drops it
    groups: bool = False  # whether KV groups may be cut, one by one
    multiple: int = 32  # kept channels are a multiple of this


class FormatDamage(Data):
    """Change of the whole model's KL when one site's weights take a format, all else as in the background."""

    site: str
    precision: Precision
    damage: float


class WidthDamage(Data):
    """Change of the whole model's KL when a dim keeps `width` channels or KV groups, all else as in the background."""

    dim: str
    width: int
    damage: float


class Background(Data):
    """The plan around which damage was measured: widths of the cut dims, and a format for each site."""

    widths: dict[str, int]
    formats: dict[str, Precision]


class Measurements(Data):
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
