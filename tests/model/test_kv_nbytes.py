"""Bytes of keys and values, by hand."""

from kv_caches import KV4
from tiny import tiny_config
from trimbit.model.kv_nbytes import cache_nbytes
from trimbit.schema.kv_cache import KVPrecision


def test_bytes_by_hand():
    config = tiny_config("llama")  # 3 blocks, 3 kv heads of 8 channels
    assert cache_nbytes(config, {}, None, 100) == 100 * 3 * 3 * 8 * 2 * 2
    packed = 4 + 2 * 2 * 2  # 8 codes of 4 bits; a scale and a minimum for each of two groups
    assert KV4.token_nbytes(8) == packed
    assert cache_nbytes(config, {}, KV4, 100) == 3 * 3 * 2 * (5 * 16 + 95 * packed)
    assert cache_nbytes(config, {"blocks.0.attn.kv": 0, "blocks.2.attn.kv": 1}, KV4, 100) == 4 * 2 * (
        5 * 16 + 95 * packed
    )
    assert cache_nbytes(tiny_config("gemma2"), {}, KV4, 100) == 3 * 2 * (2 * 7 * 16 + 5 * 16 + 95 * packed)
    assert [KVPrecision(bits=bits).token_nbytes(64) for bits in (2, 3, 4, 8)] == [20, 28, 36, 68]
