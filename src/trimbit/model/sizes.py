"""Sizes of a model's axes and sliding windows, from its config."""

from typing import Any

from transformers import DynamicCache, PreTrainedConfig

from trimbit.errors import PlanError
from trimbit.schema.kv_cache import KVPrecision


def sizes_of(config: PreTrainedConfig) -> dict[str, int]:
    """The size of each factor of the axes."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "hidden": config.hidden_size,
        "kv": kv,
        "g": heads // kv,
        "d": head_dim,
        "dv": head_dim,
        "mid": config.intermediate_size,
        "vocab": config.vocab_size,
    }


def sliding_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The sliding window of each block's attention, in tokens; None: full attention."""
    layers: list[Any] = DynamicCache(config=config).layers
    return tuple(layer.sliding_window if layer.is_sliding else None for layer in layers)


def check_kv_cache(precision: KVPrecision | None, config: PreTrainedConfig) -> None:
    """Refuse a format of the KV cache that does not fit a model with this config.

    Raises:
        PlanError: if a group is longer than a head, or no layer has full attention.
    """
    if precision is None:
        return
    if None not in sliding_windows(config):
        raise PlanError(
            "kv_cache: every layer of this model has a sliding window, and the cache of such layers is not quantised; "
            "leave kv_cache out"
        )
    head_dim = sizes_of(config)["d"]
    if precision.group is not None and precision.group > head_dim:
        raise PlanError(
            f"kv_cache: the group has {precision.group} channels, but head_dim is only {head_dim}; "
            f"give a group of at most {head_dim}, or null for a whole head"
        )
