"""The quantisation grid of a weight: scale and zero point of each group, by absmax or by least squared error.

Codes start at 0. Value = s * (c - z) for every integer format, with z = 2^(b-1) for symmetric ones, and for ternary,
with z = 1; m - s + 2 s * c for binary, with m in place of z; s * level[c] for NF4.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from trimbit.errors import NumericsError
from trimbit.kernels.weights import per_column
from trimbit.schema.precision import NF4_LEVELS, BFloat16, Binary, Int, NormalFloat, Run, Ternary
from trimbit.transform.quant.lloyd import mean_size, middle_of_two, ternary_scale

ScaleSearch = Literal["absmax", "mse"]
SHRINKS = tuple(1.0 - 0.03 * step for step in range(24))  # ours: 1.00 down to 0.31 of the group's range
CHUNK, CPU_CHUNK = 4_000_000, 100_000  # elements searched at a time: bounds memory; on a CPU, fit its cache
FLOAT16_MAX = 65504.0
PLAIN, TABLE = 0.0, -1.0  # in place of a top code: bf16 values; NF4
LEVELS = torch.tensor(NF4_LEVELS)
MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Scales and zero points (binary: means) of every run of a weight, fp16-exact; None for bf16 runs."""

    runs: tuple[Run, ...]
    scales: list[Float[Tensor, "rows _"] | None]
    zeros: list[Float[Tensor, "rows _"] | None]

    def columns(self, w: Float[Tensor, "rows cols"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The values to round, and their step, zero point and top code (or PLAIN, TABLE), all [rows, cols].

        The values are w, but w - (m - s) in binary runs: so shifted, m - s and m + s are an integer grid of step 2 s.
        Rounding with feedback is not affected: an error is a difference.
        """
        parts = w.split([run.count for run in self.runs], dim=1)
        found = [_columns(*each) for each in zip(parts, self.runs, self.scales, self.zeros, strict=True)]
        w, step, zero, top = (torch.cat(each, 1) for each in zip(*found, strict=True))
        return w, step, zero, top


def _columns(w: Tensor, run: Run, scale: Tensor | None, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    precision = run.precision
    if scale is None or zero is None or isinstance(precision, BFloat16):
        return w, torch.ones_like(w), torch.zeros_like(w), torch.full_like(w, PLAIN)
    scale, zero = (per_column(each, precision.group, run.count) for each in (scale, zero))
    if isinstance(precision, Binary):
        return w - (zero - scale), 2 * scale, torch.zeros_like(w), torch.ones_like(w)
    if isinstance(precision, NormalFloat):
        return w, scale, zero, torch.full_like(w, TABLE)
    codes = len(precision.levels) if isinstance(precision, Ternary) else 2**precision.bits
    return w, scale, zero, torch.full_like(w, codes - 1)


def fit_grid(
    w: Float[Tensor, "rows cols"],
    runs: tuple[Run, ...],
    search: ScaleSearch,
    weighting: Float[Tensor, " cols"] | None = None,
) -> Grid:
    """Choose the grid of each group of each run.

    `absmax` spans the group's range; `mse` shrinks that range to the least squared error, or solves for it with two or
    three levels. Each column's squared error is multiplied by `weighting` (the diagonal of H), if given.

    Raises:
        NumericsError: if a scale does not fit fp16.
    """
    scales: list[Tensor | None] = []
    zeros: list[Tensor | None] = []
    at = 0
    for run in runs:
        part = w[:, at : at + run.count]
        weight = None if weighting is None else weighting[at : at + run.count]
        at += run.count
        if isinstance(run.precision, BFloat16):
            scales.append(None)
            zeros.append(None)
            continue
        rows = max(1, (CPU_CHUNK if w.device.type == "cpu" else CHUNK) // run.count)
        fitted = [_fit_run(chunk, run.precision, search, weight) for chunk in part.split(rows)]
        scales.append(torch.cat([scale for scale, _ in fitted]))
        zeros.append(torch.cat([zero for _, zero in fitted]))
    return Grid(runs=runs, scales=scales, zeros=zeros)


def _fit_run(
    w: Tensor, precision: Int | NormalFloat | Ternary | Binary, search: ScaleSearch, weighting: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, count = w.shape
    group = precision.group or count
    pad = -count % group
    x = functional.pad(w, (0, pad), mode="replicate").view(rows, -1, group)  # padding keeps the range, at zero cost
    cost = functional.pad(w.new_ones(count) if weighting is None else weighting, (0, pad)).view(1, -1, group)
    if isinstance(precision, Ternary | Binary):
        scale, zero = _solved(x, precision, search, cost)
    else:
        scale, zero = _searched(x, precision, search, cost)
    return scale.squeeze(-1), zero.squeeze(-1)


def _solved(x: Tensor, precision: Ternary | Binary, search: ScaleSearch, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point or mean, [rows, groups, 1], of formats whose least squared error needs no search."""
    if isinstance(precision, Ternary):
        scale = _float16(ternary_scale(x, cost) if search == "mse" else x.abs().amax(-1, keepdim=True))
        return scale, torch.ones_like(scale)
    mean = torch.zeros_like(x[..., :1])
    if precision.mean:
        low, high = x.aminmax(dim=-1, keepdim=True)
        mean = _float16(middle_of_two(x, cost) if search == "mse" else (low + high) / 2)
    off = (x - mean).abs_()
    return _float16(mean_size(off, cost) if search == "mse" else off.amax(-1, keepdim=True)), mean


def _searched(x: Tensor, precision: Int | NormalFloat, search: ScaleSearch, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, [rows, groups, 1], from ranges of the group shrunk by factors."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scratch = torch.empty_like(x), torch.empty_like(x)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in SHRINKS if search == "mse" else (1.0,):
        for side in _sides(precision, search):
            scale, zero = _grid(low * shrink, high * shrink, precision, side)
            error = _squared_error(x, scale, zero, precision, cost, scratch)
            if best is None:
                best = (error, scale, zero)
                continue
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better, zero, best[2]),
            )
    assert best is not None
    return best[1], best[2]


def _sides(precision: Int | NormalFloat, search: ScaleSearch) -> tuple[float, ...]:
    """Signs of a scale to try: both if the levels on the two sides of zero differ."""
    both = isinstance(precision, NormalFloat) or precision.symmetric
    return (1.0, -1.0) if both and search == "mse" else (1.0,)


def _most_steps(precision: Int | NormalFloat) -> float:
    """Into how many steps a range is divided, from zero to its farther end."""
    if isinstance(precision, NormalFloat):
        return 1.0
    return 2.0 ** (precision.bits - 1) - 1 if precision.symmetric else 2.0**precision.bits - 1


def _grid(low: Tensor, high: Tensor, precision: Int | NormalFloat, side: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point, [rows, groups, 1], of a range."""
    steps = _most_steps(precision)
    if isinstance(precision, NormalFloat):
        scale = side * _float16(torch.maximum(-low, high))
        return scale, torch.zeros_like(scale)
    if precision.symmetric:
        scale = side * _float16(torch.maximum(-low, high) / steps)
        return scale, torch.full_like(scale, steps + 1)
    low = low.clamp(max=0)
    scale = _float16((high.clamp(min=0) - low) / steps)
    zero = torch.where(scale > 0, (-low / scale.clamp(min=torch.finfo(torch.float32).tiny)).round(), 0.0)
    return scale, zero.clamp(0, steps)


def _float16(scale: Tensor) -> Tensor:
    """A scale or mean rounded to fp16."""
    if not bool((scale.abs() <= FLOAT16_MAX).all()):
        raise NumericsError(
            f"a scale of {scale.abs().max():.3g} does not fit fp16 (largest {FLOAT16_MAX:g}); weights are too large"
        )
    return scale.to(torch.float16).to(torch.float32)


def _squared_error(
    x: Tensor, scale: Tensor, zero: Tensor, precision: Int | NormalFloat, cost: Tensor, scratch: tuple[Tensor, Tensor]
) -> Tensor:
    """The squared error of each group's nearest values on a grid, [rows, groups, 1]; works in place in `scratch`."""
    at, level = scratch
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)  # too small for fp16: all values round to zero
    if isinstance(precision, NormalFloat):
        torch.div(x, safe, out=at)
        level = LEVELS.to(x.device)[torch.bucketize(at, MIDPOINTS.to(x.device))]
    else:
        torch.addcmul(zero, x, 1 / safe, out=at)
        torch.round(at, out=level).clamp_(0, 2**precision.bits - 1)
    return level.sub_(at).square_().mul_(cost).sum(-1, keepdim=True).mul_(safe.square())


def nearest(x: Tensor, safe: Tensor, zero: Tensor, top: Tensor, *, tables: bool) -> tuple[Tensor, Tensor]:
    """The codes nearest to x and their levels, in units of the scale; for PLAIN elements they are meaningless.

    All tensors have one shape; `safe` is the scale, one where it is zero; `tables` says whether any top is TABLE.
    """
    x = x / safe
    codes = torch.minimum(x.round().add_(zero).clamp_(min=0), top)
    levels = codes - zero
    if tables:
        table, index = top == TABLE, torch.bucketize(x, MIDPOINTS.to(x.device))
        codes, levels = torch.where(table, index.float(), codes), torch.where(table, LEVELS.to(x.device)[index], levels)
    return codes, levels
