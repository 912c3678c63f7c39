"""Refit the weight that writes to the residual stream, so that the kept channels compensate for the cut ones.

Legend: y = W x_d + b the uncut output over all channels x_d; x the kept channels of the compressed path; H = E[x x^T],
C = E[x_d x^T], both centred. The new weight is the ridge solution, shrunk towards the kept columns W_K:
W' = W_K + (W C - W_K H) (H + lambda * mean(diag H) * I)^-1, with bias b' = b + W E[x_d] - W' E[x].
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from trimbit.calibrate.moments import Moments
from trimbit.schema.base import Schema

PAPER = (
    "OSSCAR (arXiv:2403.12983) for the refit; FLAP (arXiv:2312.11983) for the bias; the centred, shrunken form is ours"
)


class Config(Schema):
    """How weights are refitted; the plan's `biases` name them."""

    # ours; shares of mean(diag H); keeping W_K is always tried too
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    held_out: float = Field(default=0.125, gt=0, lt=1)  # ours: share of the calibration rows that choose the ridge


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """A refitted weight [rows, k], its bias [rows], the ridge chosen (None: W_K kept) and its held-out error."""

    weight: Tensor
    bias: Tensor
    ridge: float | None
    error: float


def refit(
    w: Float[Tensor, "rows m"], w_kept: Float[Tensor, "rows k"], bias: Float[Tensor, " rows"] | None,
    train: Moments, held: Moments, config: Config,
) -> Refit:  # fmt: skip
    """Choose the ridge on held-out tokens; solves in fp64.

    Args:
        w: the dense weight over all m channels.
        w_kept: its kept columns.
        bias: the dense bias, or None.
        train: moments of the kept channels, with their cross moments with the dense path.
        held: the same on held-out tokens.
        config: ridges to try.
    """
    assert train.cross is not None
    assert train.dense_mean is not None
    w, w_kept, mean, dense_mean = w.double(), w_kept.double(), train.mean.double(), train.dense_mean.double()
    h = train.h.double() - mean.outer(mean)
    target = w @ (train.cross.double() - dense_mean.outer(mean)) - w_kept @ h
    scale = h.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    offset = w.new_zeros(w.shape[0], dtype=torch.float64) if bias is None else bias.double()
    eye = torch.eye(h.shape[0], dtype=torch.float64, device=h.device)
    best: Refit | None = None
    for ridge in (None, *config.ridges):
        weight = w_kept
        if ridge is not None:
            factor, failed = torch.linalg.cholesky_ex(h + ridge * scale * eye)
            if bool(failed):
                continue  # a larger ridge, or keeping W_K, remains
            weight = w_kept + torch.cholesky_solve(target.T, factor).T
        shift = w @ dense_mean - weight @ mean
        error = _held_out_error(w, weight, shift, held)
        if best is None or error < best.error:
            best = Refit(weight=weight.float(), bias=(offset + shift).float(), ridge=ridge, error=error)
    assert best is not None
    return best


def _held_out_error(w: Tensor, weight: Tensor, shift: Tensor, held: Moments) -> float:
    """E |W x_d - W' x - s|^2 on the held-out tokens, minus the part that does not depend on W' and s."""
    assert held.cross is not None
    assert held.dense_mean is not None
    quadratic = ((weight @ held.h.double()) * weight).sum()
    linear = ((w @ held.cross.double()) * weight).sum()
    gap = w @ held.dense_mean.double() - weight @ held.mean.double()
    return float(quadratic - 2 * linear + shift @ shift - 2 * shift @ gap)


def bias_for(
    w: Float[Tensor, "rows m"],
    quantised: Float[Tensor, "rows k"],
    bias: Float[Tensor, " rows"] | None,
    moments: Moments,
) -> Float[Tensor, " rows"]:
    """The bias that keeps the mean output, now that the weight is quantised: b + W E[x_d] - Q E[x]."""
    assert moments.dense_mean is not None
    shift = w @ moments.dense_mean - quantised @ moments.mean
    return shift if bias is None else bias + shift
