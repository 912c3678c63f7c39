"""The table of model families: one strict row each, tested by tests/model/test_families.py.

A row maps each site of a sub-block to the weights that read it, with their axes as `rows columns`. The first site is
the output of the sub-block's first norm; any other is written by a weight of the sub-block. For every row, tests show
that cutting a KV group or an FFN channel along these axes equals masking it, and that reordering the channels of a
head's values (`dv`) changes nothing. A family without these properties, such as OLMo-2 with its norm over the whole q
projection, cannot have a row.
"""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trimbit.errors import LayoutError


@dataclass(frozen=True, slots=True, kw_only=True)
class SubBlock:
    """The attention or the feed-forward half of a block; names are relative to the block."""

    module: str  # replaced by a no-op if the whole sub-block is dropped
    dim: Literal["kv", "mid"]  # the factor that a cut shortens
    sites: dict[str, dict[str, str]]  # site -> weight -> "rows columns"
    norms: tuple[str, ...]  # modules used only by this sub-block, and dropped with it
    vectors: dict[str, str] = field(default_factory=dict)  # other parameters of the sub-block -> axis
    out_site: str  # the site whose weight writes to the residual stream
    sizes_in_config: bool = False  # whether the module's forward reads its head counts from its config


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table."""

    attn: SubBlock
    mlp: SubBlock
    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    gain: Literal["weight", "1 + weight"] = "weight"  # the factor of a norm


def _attention(
    *, norms: tuple[str, ...] = ("input_layernorm",), fused: bool = False, qk_norm: bool = False
) -> SubBlock:
    separate = {
        "self_attn.q_proj": "kv*g*d hidden",
        "self_attn.k_proj": "kv*d hidden",
        "self_attn.v_proj": "kv*dv hidden",
    }
    return SubBlock(
        module="self_attn",
        dim="kv",
        sites={
            "a_in": {"self_attn.qkv_proj": "kv*g*d+kv*d+kv*dv hidden"} if fused else separate,
            "o_in": {"self_attn.o_proj": "hidden kv*g*dv"},
        },
        norms=norms,
        vectors={"self_attn.q_norm.weight": "d", "self_attn.k_norm.weight": "d"} if qk_norm else {},
        out_site="o_in",
        sizes_in_config=fused,
    )


def _feed_forward(*, norms: tuple[str, ...] = ("post_attention_layernorm",), fused: bool = False) -> SubBlock:
    separate = {"mlp.gate_proj": "mid hidden", "mlp.up_proj": "mid hidden"}
    return SubBlock(
        module="mlp",
        dim="mid",
        sites={
            "m_in": {"mlp.gate_up_proj": "mid+mid hidden"} if fused else separate,
            "mid": {"mlp.down_proj": "hidden mid"},
        },
        norms=norms,
        out_site="mid",
    )


_SANDWICH_ATTN = ("input_layernorm", "post_attention_layernorm")
_SANDWICH_MLP = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
FAMILIES: dict[str, Family] = {
    "llama": Family(attn=_attention(), mlp=_feed_forward()),
    "mistral": Family(attn=_attention(), mlp=_feed_forward()),
    "qwen2": Family(attn=_attention(), mlp=_feed_forward()),
    "qwen3": Family(attn=_attention(qk_norm=True), mlp=_feed_forward()),
    "gemma2": Family(attn=_attention(norms=_SANDWICH_ATTN), mlp=_feed_forward(norms=_SANDWICH_MLP), gain="1 + weight"),
    "gemma3_text": Family(
        attn=_attention(norms=_SANDWICH_ATTN, qk_norm=True), mlp=_feed_forward(norms=_SANDWICH_MLP), gain="1 + weight"
    ),
    "phi3": Family(attn=_attention(fused=True), mlp=_feed_forward(fused=True)),
}


def family_of(model_type: str) -> Family:
    """The row of a `model_type`.

    Raises:
        LayoutError: if there is none, naming the nearest family.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise unknown_family(model_type)


def unknown_family(model_type: str, file: Path | None = None) -> LayoutError:
    """The error for a model type without a row; names the nearest family, and the file with the model type."""
    near = difflib.get_close_matches(model_type.lower(), FAMILIES, n=1, cutoff=0.0)[0]
    return LayoutError(
        f"{'' if file is None else f'{file}: '}model type {model_type!r} is not in the family table; "
        f"the nearest known family is {near!r} (known: {', '.join(FAMILIES)}); "
        "to add a family, see docs/architecture.md"
    )
