"""What a search may choose from."""

from typing import Annotated

from pydantic import Field

from trimbit.schema.base import Schema
from trimbit.schema.precision import Precision


class PruneRatio(Schema):
    """A ratio of the blocks' parameters that goes before any search, the same in every pruned block."""

    ratio: float = Field(gt=0, lt=1)
    first: float = Field(
        default=0.125, ge=0, le=1
    )  # code (horseee/LLM-Pruner): 4 of 32 blocks are spared at the start,
    last: float = Field(default=0.0625, ge=0, le=1)  # and 2 at the end
    channel_multiple: int = Field(default=32, ge=1)  # ours: kept feed-forward channels


class Space(Schema):
    """What a search may choose from."""

    formats: tuple[Precision, ...]  # of every weight of the blocks, one a site
    embedding_formats: tuple[Precision, ...]  # of the embedding and the head
    # shares of a feed-forward sub-block's channels; 0 drops it
    widths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=(1.0,), min_length=1)
    prune_kv_groups: bool = False  # whether KV groups may be cut, one by one
    channel_multiple: int = Field(default=32, ge=1)  # kept channels are a multiple of this
    kept: dict[str, int] = Field(default_factory=dict)  # widths that are fixed before the search
    spared: tuple[int, ...] = ()  # blocks whose weights take `spared_format`, where there is one
    spared_format: Precision | None = None
