"""The points of a format's grid, written out one by one."""

import torch
from torch import Tensor

from trimbit.schema.precision import NF4_LEVELS, Run


def points(run: Run, scale: Tensor, zero: Tensor) -> Tensor:
    """The values that each element of a run may take, [points, rows, columns], from its groups' scales and zeros."""
    name, group = run.precision.name, run.precision.group or run.count
    of_column = [column // group for column in range(run.count)]
    s, z = scale[:, of_column], zero[:, of_column]
    if name.startswith("nf4"):
        return torch.stack([s * level for level in NF4_LEVELS])
    if name.startswith("ternary"):
        return torch.stack([-s, 0 * s, s])
    if name.startswith("mbinary"):
        return torch.stack([z - s, z + s])
    if name.startswith("binary"):
        return torch.stack([-s, s])
    return torch.stack([s * (code - z) for code in range(2**run.precision.bits)])
