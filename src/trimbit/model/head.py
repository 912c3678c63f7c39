"""Logits and KL, some tokens at a time, so that a whole window times the vocabulary is never in memory."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig

LOGIT_TOKENS = 128  # 25 MB at a vocabulary of 49,152: below 32 MiB glibc reuses memory instead of mapping it anew
Head = Callable[[Tensor], Tensor]


def logit_slices(
    head: Head, config: PreTrainedConfig, hidden: Float[Tensor, "tokens hidden"]
) -> Iterator[tuple[slice, Float[Tensor, "part vocab"]]]:
    """Logits in fp32 of the final hidden states, `LOGIT_TOKENS` at a time, with the family's soft cap."""
    cap = getattr(config, "final_logit_softcapping", None)
    for start in range(0, hidden.shape[0], LOGIT_TOKENS):
        part = slice(start, min(start + LOGIT_TOKENS, hidden.shape[0]))
        logits = head(hidden[part]).float()
        yield part, torch.tanh(logits / cap) * cap if cap else logits


def kl(log_p: Float[Tensor, "part vocab"], log_q: Float[Tensor, "part vocab"]) -> float:
    """KL(p || q) in nats, summed over tokens."""
    return float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
