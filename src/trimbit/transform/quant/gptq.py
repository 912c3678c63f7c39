"""GPTQ: quantise column by column, and compensate for each error in the columns not yet quantised.

Legend: W weight [rows, cols]; H second moment of the inputs [cols, cols]; U upper Cholesky factor of its inverse,
U^T U = H^-1. Column j is rounded to q_j; its error (w_j - q_j) / U_jj times U_j,j: is subtracted from columns j: .
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from trimbit.calibrate.inverse import inverse_factor
from trimbit.calibrate.moments import Moments
from trimbit.kernels.qtensor import QTensor, concat_rows, pack_columns
from trimbit.schema.base import Schema
from trimbit.schema.precision import Run
from trimbit.transform.quant.grid import PLAIN, TABLE, ScaleSearch, fit_grid, nearest

PAPER = "Frantar et al. 2022, arXiv:2210.17323"
NEEDS_MOMENTS = True
CHUNK = 2_000_000  # elements swept at a time
LEAST_WEIGHT = 1e-12  # of a column in the squared error of a scale


class Config(Schema):
    """Constants of GPTQ."""

    scales: ScaleSearch = "mse"
    weighted_scales: bool = True  # ours: the squared error of a scale counts each column by diag H
    act_order: bool = True  # code (IST-DASLab/gptq): large diag H first; ours: inside each run, groups stay
    damping: float = Field(default=0.01, ge=0)  # code (IST-DASLab/gptq): added to diag H, as a share of its mean
    block: int = Field(default=128, ge=1)  # code (IST-DASLab/gptq): columns that update the rest together


def quantize(w: Float[Tensor, "rows cols"], moments: Moments | None, runs: tuple[Run, ...], config: Config) -> QTensor:
    """Quantise w so that E |(w - q) x|^2 stays small, given H = E[x x^T] in `moments`; each column in its run's format.

    Raises:
        NumericsError: if the damped H is not positive definite, naming a damping that would work.
    """
    return quantize_all([w], moments, [runs], config)[0]


def quantize_all(
    ws: Sequence[Float[Tensor, "_ cols"]], moments: Moments | None, runs: Sequence[tuple[Run, ...]], config: Config
) -> list[QTensor]:
    """Quantise weights that read the same input, in one sweep over its channels, since rows are independent.

    Raises:
        NumericsError: if the damped H is not positive definite, naming a damping that would work.
    """
    assert moments is not None, "GPTQ needs moments"
    h = moments.h
    counts = [run.count for run in runs[0]]
    if any([run.count for run in other] != counts for other in runs):  # columns are swept in another order
        return [quantize(w, moments, own, config) for w, own in zip(ws, runs, strict=True)]
    order, u = _factor(h, counts, config)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    weighting = h.diagonal().clamp(min=LEAST_WEIGHT) if config.weighted_scales else None
    pieces: list[list[QTensor]] = [[] for _ in ws]
    for batch in _batches(ws):
        parts = [ws[at][rows] for at, rows in batch]
        grids = [fit_grid(part, runs[at], config.scales, weighting) for part, (at, _) in zip(parts, batch, strict=True)]
        columns = zip(*[grid.columns(part) for part, grid in zip(parts, grids, strict=True)], strict=True)
        w, scale, zero, top = (torch.cat(each)[:, order].T.contiguous() for each in columns)
        codes = _sweep(w, u, scale, zero, top, config.block).T[:, inverse]
        for (at, _), grid, own in zip(batch, grids, codes.split([len(part) for part in parts]), strict=True):
            pieces[at].append(pack_columns(own, grid.scales, grid.zeros, runs[at]))
    return [concat_rows(own) for own in pieces]


def residuals(h: Float[Tensor, "cols cols"], counts: Sequence[int], config: Config) -> Float[Tensor, "cols cols"]:
    """The R of residuals R x: (R x)_j is the part of x_j that the columns swept after column j do not predict.

    After compensation in these columns, an error w_j - q_j leaves (w_j - q_j) (R x)_j in the output, where w_j is the
    column as changed before its turn. R is U, each row divided by its diagonal, in the order of h; with the damped H,
    R x is uncorrelated, with mean squares 1 / U_jj^2. `counts` are the numbers of columns in each run.

    Raises:
        NumericsError: if the damped H is not positive definite, naming a damping that would work.
    """
    order, u = _factor(h, counts, config)
    back = order.argsort()
    return (u / u.diagonal()[:, None])[back][:, back]


def _batches(ws: Sequence[Tensor]) -> list[list[tuple[int, slice]]]:
    """Pieces of the weights, (which, rows), in batches of at most `CHUNK` elements: bounds memory."""
    max_rows = max(1, CHUNK // ws[0].shape[1])
    batches: list[list[tuple[int, slice]]] = [[]]
    room = max_rows
    for at, w in enumerate(ws):
        start = 0
        while start < w.shape[0]:
            if room == 0:
                batches.append([])
                room = max_rows
            stop = min(w.shape[0], start + room)
            batches[-1].append((at, slice(start, stop)))
            room -= stop - start
            start = stop
    return batches


def _factor(h: Tensor, counts: Sequence[int], config: Config) -> tuple[Tensor, Tensor]:
    """The order in which columns are swept, and U in that order."""
    order = _order(h.diagonal(), counts) if config.act_order else torch.arange(len(h), device=h.device)
    return order, inverse_factor(h[order][:, order], config.damping).float()


def _order(diagonal: Tensor, counts: Sequence[int]) -> Tensor:
    """Columns by falling diagonal inside each run, runs in their order."""
    pieces, at = [], 0
    for count in counts:
        pieces.append(at + diagonal[at : at + count].argsort(descending=True, stable=True))
        at += count
    return torch.cat(pieces)


def _sweep(wt: Tensor, u: Tensor, scale: Tensor, zero: Tensor, top: Tensor, block: int) -> Tensor:
    """Round the rows of the transposed weights one after the other; all but u, and the result, are [cols, rows]."""
    codes = torch.empty_like(wt)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    plain, tables = (top == PLAIN).any(1).tolist(), (top == TABLE).any(1).tolist()
    for start in range(0, wt.shape[0], block):
        stop = min(start + block, wt.shape[0])
        errors = torch.empty_like(wt[start:stop])
        for j in range(start, stop):
            column = wt[j]
            code, value = nearest(column, safe[j], zero[j], top[j], tables=tables[j])
            value = value.mul_(scale[j])
            if plain[j]:
                rounded = column.to(torch.bfloat16).float()
                code, value = torch.where(top[j] == PLAIN, rounded, code), torch.where(top[j] == PLAIN, rounded, value)
            codes[j] = code
            error = torch.div(column - value, u[j, j], out=errors[j - start])
            if j + 1 < stop:
                wt[j + 1 : stop].addr_(u[j, j + 1 : stop], error, alpha=-1)
        if stop < wt.shape[0]:
            wt[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
    return codes
