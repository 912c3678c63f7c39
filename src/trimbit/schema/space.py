"""The choices of a search: formats and widths; and cuts by a ratio, before it."""

from typing import Annotated

from pydantic import Field

from trimbit.schema.base import Schema
from trimbit.schema.precision import Precision


class PruneRatio(Schema):
    """A ratio of the blocks' parameters to cut before any search, the same in every pruned block."""

    ratio: float = Field(gt=0, lt=1)
    first: float = Field(default=0.125, ge=0, le=1)  # code (horseee/LLM-Pruner): of 32 blocks, the first 4 are spared
    last: float = Field(default=0.0625, ge=0, le=1)  # and the last 2
    channel_multiple: int = Field(default=32, ge=1)  # ours: kept feed-forward channels are a multiple of this


class Space(Schema):
    """The choices of a search."""

    formats: tuple[Precision, ...]  # for the weights of the blocks; one is chosen per site
    embedding_formats: tuple[Precision, ...]  # for the embedding and the head
    # shares of kept feed-forward channels; 0 drops the sub-block
    widths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=(1.0,), min_length=1)
    prune_kv_groups: bool = False  # whether single KV groups may be cut
    channel_multiple: int = Field(default=32, ge=1)  # kept feed-forward channels are a multiple of this
    kept: dict[str, int] = Field(default_factory=dict)  # widths fixed before the search
    spared: tuple[int, ...] = ()  # blocks whose weights take `spared_format`, if it is set
    spared_format: Precision | None = None
