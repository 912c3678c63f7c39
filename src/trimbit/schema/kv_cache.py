"""The format of the KV cache, and its size in bytes."""

from collections.abc import Sequence

from pydantic import Field

from trimbit.schema.base import Schema
from trimbit.schema.precision import SCALE_NBYTES

VALUE_NBYTES = 2  # of an unquantised key or value, in bf16


class KVPrecision(Schema):
    """The format in which the KV cache is stored during generation.

    The first `sink_tokens` and the last `recent_tokens` are stored exactly. All other tokens are quantised to `bits`
    bits, with an fp16 scale s and an fp16 minimum m for each group of channels of each token and head: x ~ s * c + m
    with c in [0, 2^b - 1]. A token is quantised once, when it leaves the recent tokens.
    """

    bits: int = Field(default=4, ge=2, le=8)  # code (efeslab/Atom): 4, asymmetric, each head separately
    group: int | None = Field(default=None, ge=1)  # channels in a group; the last may be short; None: the whole head
    sink_tokens: int = Field(default=4, ge=0)  # ours: much attention goes to the first tokens
    recent_tokens: int = Field(default=64, ge=0)  # ours

    @property
    def label(self) -> str:
        """The format in words."""
        group = "a head" if self.group is None else self.group
        exact = f"the first {self.sink_tokens} and last {self.recent_tokens} tokens exact"
        return f"{self.bits} bits, group {group}, {exact}"

    def n_groups(self, head_dim: int) -> int:
        """Number of groups in a head; the last may be short."""
        return -(-head_dim // (self.group or head_dim))

    def code_nbytes(self, head_dim: int) -> int:
        """Bytes of the codes of one token's key, or value, in one head."""
        return -(-head_dim * self.bits // 8)

    def token_nbytes(self, head_dim: int) -> int:
        """Bytes of one packed token's key, or value, in one head: codes, scales and minima."""
        return self.code_nbytes(head_dim) + 2 * SCALE_NBYTES * self.n_groups(head_dim)

    def split(self, tokens: int) -> tuple[int, int, int]:
        """Split a number of tokens into exact ones at the start, packed ones, and exact ones at the end."""
        sink = min(self.sink_tokens, tokens)
        recent = min(self.recent_tokens, tokens - sink)
        return sink, tokens - sink - recent, recent


def kv_cache_nbytes(
    heads: Sequence[int], windows: Sequence[int | None], head_dim: int, precision: KVPrecision | None, context: int
) -> int:
    """Bytes of the keys and values of `context` tokens, batch 1; exact ones are in bf16.

    Args:
        heads: number of KV heads of each layer; 0: its attention was dropped, so it stores nothing.
        windows: sliding window of each layer; None: full attention. A window of w tokens stores the last w - 1,
            exactly.
        head_dim: channels of a head.
        precision: format of the layers with full attention; None: exact.
        context: number of tokens.
    """
    exact, total = VALUE_NBYTES * head_dim, 0
    for count, window in zip(heads, windows, strict=True):
        if window is not None:
            head = exact * min(context, window - 1)
        elif precision is None:
            head = exact * context
        else:
            sink, packed, recent = precision.split(context)
            head = exact * (sink + recent) + precision.token_nbytes(head_dim) * packed
        total += 2 * count * head
    return total
