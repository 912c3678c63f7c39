"""Measured damage of each choice of each unit: plain data, stored, and solved again for any budget."""

from typing import Annotated, Literal

from pydantic import Field

from trimbit.plan import ModelRef
from trimbit.precision import Data, Precision


class Prune(Data):
    """A ratio of the blocks' parameters that goes before any search, the same in every pruned block."""

    ratio: float = Field(gt=0, lt=1)
    first: float = Field(
        default=0.125, ge=0, le=1
    )  # code (horseee/LLM-Pruner): 4 of 32 blocks are spared at the start,
    last: float = Field(default=0.0625, ge=0, le=1)  # and 2 at the end
    multiple: int = Field(default=32, ge=1)  # ours: kept feed-forward channels


class Space(Data):
    """What a search may choose from."""

    formats: tuple[Precision, ...]  # of every weight of the blocks, one a site
    table_formats: tuple[Precision, ...]  # of the embedding and the head
    # shares of a feed-forward sub-block's channels; 0 drops it
    widths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=(1.0,), min_length=1)
    groups: bool = False  # whether KV groups may be cut, one by one
    multiple: int = Field(default=32, ge=1)  # kept channels are a multiple of this
    kept: dict[str, int] = Field(default_factory=dict)  # widths that are fixed before the search
    spared: tuple[int, ...] = ()  # blocks whose weights take `spared_format`, where there is one
    spared_format: Precision | None = None


class Objective(Data):
    """What a search by trials of whole plans goes by. KL and NLL are on held-out tokens and measured in any case."""

    by: Literal["kl", "nll", "accuracy"] = "kl"  # paper: accuracy; ours: KL, whose noise is far below its differences
    steps: int = Field(default=0, ge=0)  # of recovery, before a plan is judged
    tasks: tuple[str, ...] = ()  # zero-shot ones whose mean is the accuracy; code (harrysyz99/Qmixtuner): hellaswag
    data: str | None = None  # the folder of their files
    documents: int | None = Field(default=500, ge=1)  # of each task, the first
    workers: int = Field(default=1, ge=1)  # processes that judge the plans of a batch, a whole model in each


class Outcome(Data):
    """What a trial of a whole plan found."""

    kl: float  # KL(original || model), nats a token
    nll: float  # of the token that follows, nats
    accuracy: float | None = None
    stderr: float | None = None  # of the accuracy
    correct: str | None = None  # of each document, one task after the other: "1" or "0"


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
    """The plan around which damage is measured: widths of the cut dims, and a format for each site.

    In a plan that is tried as a whole a weight may have a format of its own, under its own name.
    """

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
