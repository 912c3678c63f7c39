"""How large a model's cache of keys and values is."""

from collections.abc import Mapping

from transformers import PreTrainedConfig

from trimbit.model.sizes import sizes_of, sliding_windows
from trimbit.schema.kv_cache import KVPrecision

VALUE_NBYTES = 2  # bf16


def cache_nbytes(
    config: PreTrainedConfig, widths: Mapping[str, int], precision: KVPrecision | None, context: int
) -> int:
    """Bytes of the keys and values of `context` tokens, batch 1, exact ones in bf16.

    `config` is the original's, `widths` are those of the cut dims: dropped attention stores nothing. A layer with a
    sliding window of w keeps its last w - 1 tokens, exactly.
    """
    sizes = sizes_of(config)
    exact = VALUE_NBYTES * sizes["d"]  # of a token's keys, or values, in one head
    total = 0
    for index, window in enumerate(sliding_windows(config)):
        if window is not None:
            head = exact * min(context, window - 1)
        elif precision is None:
            head = exact * context
        else:
            sink, packed, recent = precision.split(context)
            head = exact * (sink + recent) + precision.token_nbytes(sizes["d"]) * packed
        total += 2 * widths.get(f"blocks.{index}.attn.kv", sizes["kv"]) * head
    return total
