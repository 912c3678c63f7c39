"""GPTQ: quantise column by column, and let the columns not yet done make up for each error.

Legend: W weight [rows, cols]; H second moment of the inputs [cols, cols]; U upper Cholesky factor of its inverse,
U^T U = H^-1. Column j is rounded to q_j; its error (w_j - q_j) / U_jj times U_j,j: is taken off columns j: .
"""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from trimbit.linalg import inverse_factor
from trimbit.precision import Data, Run
from trimbit.quant.grid import ScaleSearch, fit_grid
from trimbit.quant.qtensor import QTensor, pack_columns
from trimbit.stats import Moments

PAPER = "Frantar et al. 2022, arXiv:2210.17323"
NEEDS_MOMENTS = True


class Config(Data):
    """Constants of GPTQ."""

    scales: ScaleSearch = "mse"
    weighted_scales: bool = True  # ours: the squared error of a scale counts each column by diag H
    act_order: bool = True  # code (IST-DASLab/gptq): columns of large diag H first, here inside each run; groups stay where they are
    damping: float = Field(default=0.01, ge=0)  # code (IST-DASLab/gptq): added to diag H, as a share of its mean
    block: int = Field(default=128, ge=1)  # code (IST-DASLab/gptq): columns whose updates to the rest are applied together


def quantize(w: Float[Tensor, "rows cols"], moments: Moments | None, runs: tuple[Run, ...], config: Config) -> QTensor:
    """Quantise w so that E |(w - q) x|^2 stays small, given H = E[x x^T] in `moments`; each column in its run's format.

    Raises:
        NumericsError: if the damped H is not positive definite; says the damping that would work.
    """
    assert moments is not None, "GPTQ needs moments"  # noqa: S101
    h = moments.h.double()
    order = _order(h.diagonal(), runs) if config.act_order else torch.arange(w.shape[1])
    u = inverse_factor(h[order][:, order], config.damping).float()
    weighting = h.diagonal().float().clamp(min=1e-12) if config.weighted_scales else None
    grid = fit_grid(w, runs, config.scales, weighting)
    scale, zero, top = (t[..., order] for t in grid.columns(w.shape[0]))
    codes = _sweep(w[:, order].T.contiguous(), u, scale.T.contiguous(), zero.T.contiguous(), top, config.block)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return pack_columns(codes.T[:, inverse].contiguous(), grid.scales, grid.zeros, runs)


def _order(diagonal: Tensor, runs: tuple[Run, ...]) -> Tensor:
    """Columns by falling diagonal inside each run, runs in their order."""
    pieces, at = [], 0
    for run in runs:
        pieces.append(at + diagonal[at : at + run.count].argsort(descending=True, stable=True))
        at += run.count
    return torch.cat(pieces)


def _sweep(wt: Tensor, u: Tensor, scale: Tensor, zero: Tensor, top: Tensor, block: int) -> Tensor:
    """Round the rows of the transposed weight one after the other; returns their codes, [cols, rows]."""
    codes = torch.empty_like(wt)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    for start in range(0, wt.shape[0], block):
        stop = min(start + block, wt.shape[0])
        errors = torch.empty_like(wt[start:stop])
        for j in range(start, stop):
            column = wt[j]
            if top[j] == 0:
                codes[j] = value = column.to(torch.bfloat16).float()
            else:
                code = (column / safe[j]).round_().add_(zero[j]).clamp_(0, float(top[j]))
                codes[j] = code
                value = (code - zero[j]).mul_(scale[j])
            error = (column - value).div_(u[j, j])
            errors[j - start] = error
            if j + 1 < stop:
                wt[j + 1 : stop].addr_(u[j, j + 1 : stop], error, alpha=-1)
        if stop < wt.shape[0]:
            wt[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
    return codes
