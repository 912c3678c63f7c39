"""Bytes of a cache from its recorded shape."""

import pytest

from trimbit.schema.kv_cache import KVPrecision, kv_cache_nbytes
from trimbit.schema.run import CacheRecord

KV = KVPrecision(bits=4, group=4, sink_tokens=2, recent_tokens=3)
PACKED = 4 + 2 * 2 * 2  # 8 codes of 4 bits; a scale and a minimum for each of two groups


def test_bytes_by_hand():
    """A full layer of 3 heads, one of 1 head and a window of 8, and one without attention."""
    record = CacheRecord(precision=KV, head_dim=8, heads=(3, 1, 0), windows=(None, 8, None))
    assert record.nbytes(100) == 2 * 3 * (5 * 16 + 95 * PACKED) + 2 * 1 * 7 * 16
    assert record.bf16_nbytes(100) == 2 * 3 * 100 * 16 + 2 * 1 * 7 * 16
    assert record.nbytes(4) == record.bf16_nbytes(4) == 2 * (3 + 1) * 4 * 16


def test_heads_and_windows_are_of_the_same_layers():
    with pytest.raises(ValueError, match="shorter"):
        kv_cache_nbytes((1, 2), (None,), 8, None, 10)
