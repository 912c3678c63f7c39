"""Logits and KL, some tokens at a time, so that the logits of a whole window are never in memory."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig

from trimbit.model.forward.compute import fast_bf16, native

LOGIT_TOKENS = 128  # 25 MB at a vocabulary of 49,152: below 32 MiB glibc reuses memory instead of mapping it again
LOGIT_TOKENS_GPU = 1024  # few large products keep a GPU busy
CACHED = 2**20  # bytes of fp32 logits
NOTHING = -100  # label of the last token of a row, which no token follows
Head = Callable[[Tensor], Tensor]
Logits = Iterator[tuple[slice, Float[Tensor, "part vocab"]]]


class Divergence(NamedTuple):
    """A model compared with a reference on the same tokens."""

    kl: float  # KL(reference || model), nats a token
    nll: float  # of the next token, under the model, nats


def head_of(weight: Float[Tensor, "vocab hidden"]) -> Head:
    """The head with this weight.

    Where the CPU has no bf16 instructions, a bf16 weight is converted here, once, and not again for every slice.
    """
    fast = native(weight.dtype, weight.device.type)
    if fast is weight.dtype:
        return partial(functional.linear, weight=weight)
    return partial(_rounded, weight=weight.to(fast))


def _rounded(x: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "tokens vocab"]:
    """The product in bf16, the weight being held in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x.bfloat16().float(), weight).bfloat16()


def logit_slices(head: Head, config: PreTrainedConfig, hidden: Float[Tensor, "tokens hidden"]) -> Logits:
    """Logits in fp32 of the final hidden states, some tokens at a time; with the config's soft cap, if it has one."""
    cap = getattr(config, "final_logit_softcapping", None)
    step = LOGIT_TOKENS if hidden.device.type == "cpu" else LOGIT_TOKENS_GPU
    for start in range(0, hidden.shape[0], step):
        part = slice(start, min(start + step, hidden.shape[0]))
        with fast_bf16():
            logits = head(hidden[part]).float()
        yield part, torch.tanh(logits / cap) * cap if cap else logits


def log_softmax(logits: Float[Tensor, "part vocab"]) -> Float[Tensor, "part vocab"]:
    """Log-probabilities, in place of the logits."""
    for part in _cached(logits):
        part.copy_(torch.log_softmax(part, -1))
    return logits


def kl(log_p: Float[Tensor, "part vocab"], log_q: Float[Tensor, "part vocab"]) -> float:
    """KL(p || q) in nats, summed over tokens."""
    pairs = zip(_cached(log_p), _cached(log_q), strict=True)
    return sum(float(torch.linalg.vecdot(p.exp(), p - q).double().sum()) for p, q in pairs)


def _cached(x: Float[Tensor, "part vocab"]) -> Iterable[Float[Tensor, "few vocab"]]:
    """A few tokens at a time, whose logits stay in a core's cache: 4 to 5 times as fast; on a GPU all at once."""
    return x.split(max(1, CACHED // (4 * x.shape[-1]))) if x.device.type == "cpu" else (x,)


def following(tokens: Int[Tensor, "rows length"]) -> Int[Tensor, " tokens"]:
    """The next token of each token, for all rows; `NOTHING` at the end of a row."""
    return functional.pad(tokens[:, 1:], (0, 1), value=NOTHING).flatten()


def compare_logits(
    log_ps: Iterable[Float[Tensor, "part vocab"]], logits: Iterator[tuple[slice, Float[Tensor, "part vocab"]]],
    after: Int[Tensor, " tokens"],
) -> Divergence:  # fmt: skip
    """Compare a reference's log-probabilities with a model's logits, slice by slice; `after` has the next tokens."""
    divergence = surprise = 0.0
    for log_p, (part, own) in zip(log_ps, logits, strict=True):
        log_q = log_softmax(own)
        divergence += kl(log_p, log_q)
        labels = after[part].to(log_q.device)
        surprise += float(functional.nll_loss(log_q, labels, reduction="sum", ignore_index=NOTHING))
    return Divergence(kl=divergence / len(after), nll=surprise / max(int((after != NOTHING).sum()), 1))


def loss_gradient(
    head: Head, config: PreTrainedConfig, hidden: Float[Tensor, "tokens hidden"], labels: Int[Tensor, " tokens"],
    taught: Logits | None, count: int,
) -> float:  # fmt: skip
    """Backpropagate cross-entropy, or KL(taught || model) if `taught` is given, summed over tokens, over `count`.

    The head runs forward and backward some tokens at a time, so that only their logits are in memory. For both losses,
    the gradient in the logits is the model's distribution minus the target distribution. Returns the loss.
    """
    leaf, total = hidden.detach().requires_grad_(), 0.0
    for part, logits in logit_slices(head, config, leaf):
        with torch.no_grad():
            log_q = torch.log_softmax(logits, -1)
            if taught is None:
                total += float(functional.nll_loss(log_q, labels[part], reduction="sum"))
                grad = log_q.exp_()
                grad[torch.arange(len(grad)), labels[part]] -= 1
            else:
                log_p = torch.log_softmax(next(taught)[1], -1)
                p = log_p.exp()
                total += float(torch.linalg.vecdot(p, log_p.sub_(log_q)).double().sum())
                grad = log_q.exp_().sub_(p)
        logits.backward(grad / count)
    hidden.backward(leaf.grad)
    return total / count
