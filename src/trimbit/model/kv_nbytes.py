"""The size of a model's KV cache."""

from collections.abc import Mapping

from transformers import PreTrainedConfig

from trimbit.model.sizes import sizes_of, sliding_windows
from trimbit.schema.kv_cache import KVPrecision, kv_cache_nbytes


def cache_nbytes(
    config: PreTrainedConfig, widths: Mapping[str, int], precision: KVPrecision | None, context: int
) -> int:
    """Bytes of the keys and values of `context` tokens, batch 1; see `kv_cache_nbytes`.

    `config` is the original's; `widths` are those of the cut dims. Dropped attention stores nothing.
    """
    sizes, windows = sizes_of(config), sliding_windows(config)
    heads = [widths.get(f"blocks.{index}.attn.kv", sizes["kv"]) for index in range(len(windows))]
    return kv_cache_nbytes(heads, windows, sizes["d"], precision, context)
