"""Attention for few queries and many keys: the heads of a group share keys and values without copies of them.

When text is sampled on a CPU, one query per row at a time, PyTorch's fused attention takes most of the time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "trimbit_grouped"


def grouped_attention(
    module: nn.Module, query: Float[Tensor, "rows heads queries d"], key: Float[Tensor, "rows groups keys d"],
    value: Float[Tensor, "rows groups keys dv"], attention_mask: Tensor | None, scaling: float | None = None,
    softcap: float | None = None, **_: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:  # fmt: skip
    """softmax(Q K^T * scaling + mask) V, with the softmax in fp32; the signature is that of transformers."""
    rows, heads, queries, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(rows, groups, heads // groups * queries, width)
    scores = (grouped @ key.transpose(2, 3)).float().view(rows, heads, queries, -1)
    scores = scores * (scaling if scaling is not None else module.head_dim**-0.5)  # type: ignore[operator]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1).to(query.dtype).view(rows, groups, heads // groups * queries, -1)
    return (weights @ value).view(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


@contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Run a model with `grouped_attention`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, eager_mask)
