"""A low-rank pair for a quantised weight, which corrects part of its error or is the start of training.

Legend: y = W x; Q the quantised W; D = W - Q; H = E[x x^T], not centred (R in QERA, which writes y = x W); B [rows,
rank] and A [rank, cols] the pair, so that y ~ (Q + B A) x. Of all pairs of that rank, B A = U U^T D has the least
tr((D - B A) H (D - B A)^T), where U holds the leading eigenvectors of D H D^T. LoftQ has H = I, which gives the
truncated SVD of D. QERA writes the same B A as (D H^1/2 truncated to the rank) H^-1/2; this form needs neither root nor
inverse.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from trimbit.calibrate.moments import Moments
from trimbit.errors import NumericsError, RecipeError
from trimbit.kernels.qtensor import QTensor
from trimbit.schema.base import Schema

PAPER = "LoftQ (arXiv:2310.08659), QERA (arXiv:2410.06040); the form without a root of H is ours"
Quantize = Callable[[Tensor], QTensor]  # of a matrix of the weight's shape


class Config(Schema):
    """How the pair starts."""

    init: Literal["zeros", "loftq", "qera"] = "loftq"  # ours
    rank: int = Field(default=8, ge=1)  # code (huggingface/peft)
    iterations: int = Field(default=1, ge=1)  # code (huggingface/peft): LoftQ's T; code (yxli2123/LoftQ) shows 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """The pair, in fp32 with values that bf16 holds exactly."""

    a: Float[Tensor, "rank cols"]
    b: Float[Tensor, "rows rank"]

    def dense(self) -> Float[Tensor, "rows cols"]:
        """B A."""
        return self.b @ self.a


def correct(
    w: Float[Tensor, "rows cols"], quantize: Quantize, moments: Moments | None, config: Config,
    generator: torch.Generator,
) -> tuple[QTensor, LowRank]:  # fmt: skip
    """Quantise w and start its pair by `config.init`; only QERA needs moments, only zeros need the generator.

    Raises:
        RecipeError: if the rank is larger than the weight's smaller side.
        NumericsError: if the weight or H is not finite.
    """
    if config.init == "loftq":
        return loftq(w, quantize, config)
    if config.init == "zeros":
        start = zeros(w, config.rank, generator)
        return quantize(w), start
    assert moments is not None, "QERA needs moments"
    q = quantize(w)
    return q, qera(w, q.dequantize(), moments, config)


def zeros(w: Float[Tensor, "rows cols"], rank: int, generator: torch.Generator) -> LowRank:
    """B = 0, so that nothing changes yet, and A drawn from [-1, 1] / sqrt(cols).

    Raises:
        RecipeError: if the rank is larger than the weight's smaller side.
        NumericsError: if the weight is not finite.
    """
    _check(w, rank)
    a = torch.empty(rank, w.shape[1])
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # code (huggingface/peft)
    return LowRank(a=_bf16(a).to(w.device), b=w.new_zeros(w.shape[0], rank))


def loftq(w: Float[Tensor, "rows cols"], quantize: Quantize, config: Config) -> tuple[QTensor, LowRank]:
    """Alternate Q <- quantize(W - B A) and B A <- the truncated SVD of W - Q; solves in fp64.

    Returns:
        The iterate of least |W - Q - B A|_F with the rounded pair. The plain Q with B A = 0 is one of them, so that the
        result is never worse than plain quantisation.

    Raises:
        RecipeError: if the rank is larger than the weight's smaller side.
        NumericsError: if the weight is not finite.
    """
    _check(w, config.rank)
    pair = LowRank(a=w.new_zeros(config.rank, w.shape[1]), b=w.new_zeros(w.shape[0], config.rank))
    q = quantize(w)
    d = w.double() - q.dequantize()
    best, least = (q, pair), float(d.square().sum())
    for step in range(config.iterations):
        if step > 0:
            q = quantize(w - pair.dense())
            d = w.double() - q.dequantize()
        pair = _project(d, None, config.rank)
        error = float((d - pair.dense()).square().sum())
        if error < least:
            best, least = (q, pair), error
    return best


def qera(w: Float[Tensor, "rows cols"], q: Float[Tensor, "rows cols"], moments: Moments, config: Config) -> LowRank:
    """The pair of least E |(W - Q - B A) x|^2 on the uncentred H of `moments`; solves in fp64.

    A singular H needs no damping: U U^T D depends on H only through D H D^T, so of the many optima this is the limit of
    vanishing damping. |W - Q - B A|_F is at most |W - Q|_F, up to the rounding to bf16.

    Raises:
        RecipeError: if the rank is larger than the weight's smaller side.
        NumericsError: if the weight or H is not finite.
    """
    _check(w, config.rank)
    if not bool(moments.h.isfinite().all()):
        raise NumericsError("the second moment H of a layer's inputs is not finite: the model overflows on this text")
    return _project(w.double() - q, moments.h.double(), config.rank)


def _project(d: Tensor, h: Tensor | None, rank: int) -> LowRank:
    """B A = U U^T D, exact up to the rounding to bf16; None for h means I.

    Each column of B is as long as its row of A (ours, for QERA; LoftQ's square roots of singular values do the same).
    """
    tall = d.shape[0] > d.shape[1]
    basis, small = torch.linalg.qr(d) if tall else (None, d)  # U lies in the span of D: the smaller side is enough
    gram = small @ (small.T if h is None else h @ small.T)
    u = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    if basis is not None:
        u = basis @ u
    a = u.T @ d
    root = a.norm(dim=1).sqrt()
    safe = torch.where(root == 0, torch.ones_like(root), root)
    return LowRank(a=_bf16(a / safe[:, None]), b=_bf16(u * root))


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def require_rank(rank: int, rows: int, cols: int) -> None:
    """Refuse a rank that a weight cannot have.

    Raises:
        RecipeError: naming the largest.
    """
    if rank > min(rows, cols):
        raise RecipeError(
            f"a correction of rank {rank} does not fit a weight of {rows} x {cols}: the rank can be {min(rows, cols)} "
            "at most"
        )


def _check(w: Tensor, rank: int) -> None:
    require_rank(rank, *w.shape)
    if not bool(w.isfinite().all()):
        raise NumericsError("a weight has values that are not finite")
