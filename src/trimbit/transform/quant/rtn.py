"""Round to nearest: every weight to the closest point of its group's grid."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trimbit.calibrate.moments import Moments
from trimbit.kernels.qtensor import QTensor, concat_rows, pack_columns
from trimbit.schema.base import Schema
from trimbit.schema.precision import Run
from trimbit.transform.quant.grid import PLAIN, TABLE, Grid, ScaleSearch, fit_grid, nearest

PAPER = "baseline"
NEEDS_MOMENTS = False
CHUNK = 2_000_000  # elements rounded at a time: bounds memory


class Config(Schema):
    """How scales are chosen."""

    scales: ScaleSearch = "absmax"


def quantize(w: Float[Tensor, "rows cols"], moments: Moments | None, runs: tuple[Run, ...], config: Config) -> QTensor:
    """Round each element of w to the grid of its group; the moments are not used."""
    pieces = []
    for part in w.split(max(1, CHUNK // w.shape[1])):
        grid = fit_grid(part, runs, config.scales)
        pieces.append(pack_columns(round_columns(*grid.columns(part)), grid.scales, grid.zeros, runs))
    return concat_rows(pieces)


def quantize_all(
    ws: Sequence[Float[Tensor, "_ cols"]], moments: Moments | None, runs: Sequence[tuple[Run, ...]], config: Config
) -> list[QTensor]:
    """Round weights that read the same input."""
    return [quantize(w, moments, own, config) for w, own in zip(ws, runs, strict=True)]


def rounding_errors(w: Float[Tensor, "rows cols"], grid: Grid) -> Float[Tensor, "rows cols"]:
    """The change in each element from rounding it to its grid."""
    x, scale, zero, top = grid.columns(w)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    _, levels = nearest(x, safe, zero, top, tables=bool((top == TABLE).any()))
    return torch.where(top == PLAIN, x.to(torch.bfloat16).float(), levels * scale) - x


def round_columns(w: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
    """The nearest code of each element, or its value in bf16 where the top code is PLAIN."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes, _ = nearest(w, safe, zero, top, tables=bool((top == TABLE).any()))
    return torch.where(top == PLAIN, w.to(torch.bfloat16).float(), codes)
