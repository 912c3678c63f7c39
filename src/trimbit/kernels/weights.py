"""Dequantising packed weights in plain PyTorch: the reference for faster kernels."""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from trimbit.kernels.pack import digits, spread, unpack
from trimbit.schema.precision import BFloat16, Codebook, Int, Run


def dequantize(
    codes: UInt8[Tensor, "rows code_nbytes"],
    scales: Float[Tensor, "rows groups"],
    zeros: UInt8[Tensor, "rows zero_nbytes"] | None,
    runs: tuple[Run, ...],
    dtype: torch.dtype,
) -> Float[Tensor, "rows cols"]:
    """The dense weight of packed codes; groups restart at each run.

    s * c; s * (c - z) with a zero point; s * level[c] for a codebook; m + s * level[c] for a codebook with a mean:
    computed in fp32 and rounded once to `dtype`.
    """
    pieces: list[Tensor] = []
    at_code = at_scale = at_zero = 0
    for run in runs:
        precision, count = run.precision, run.count
        raw = codes[:, at_code : at_code + precision.code_nbytes(count)]
        at_code += raw.shape[1]
        if isinstance(precision, BFloat16):
            pieces.append(_floats(raw, torch.bfloat16).to(dtype))
            continue
        scale = scales[:, at_scale : at_scale + precision.n_groups(count)]
        at_scale += scale.shape[1]
        shift = None
        if nbytes := precision.zero_nbytes(count):
            shift = zeros[:, at_zero : at_zero + nbytes]  # type: ignore[index]
            at_zero += nbytes
        pieces.append(_values(raw, scale, shift, precision, count).to(dtype))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _values(
    raw: Tensor, scale: Tensor, shift: Tensor | None, precision: Int | Codebook, count: int
) -> Float[Tensor, "rows count"]:
    """The values of one run in fp32; `raw` are its codes, `shift` its zero points or means, both as stored bytes."""
    group = precision.group or count
    if isinstance(precision, Codebook):
        levels = spread(raw, _levels(precision, raw.device))[:, :count]
        _by_group(levels, group, Tensor.mul_, scale.float())
        if shift is not None:
            _by_group(levels, group, Tensor.add_, _floats(shift, torch.float16).float())
        return levels
    codes = unpack(raw, precision.bits, count).float()
    if shift is None:
        codes.sub_(2 ** (precision.bits - 1))
    else:
        zeros = unpack(shift, precision.bits, precision.n_groups(count)).float()
        _by_group(codes, group, Tensor.sub_, zeros)
    _by_group(codes, group, Tensor.mul_, scale.float())
    return codes


def _by_group(
    values: Float[Tensor, "rows count"], group: int, operation: Callable[[Tensor, Tensor], Tensor],
    per_group: Float[Tensor, "rows groups"],
) -> None:  # fmt: skip
    """Apply `operation` in place to each group and its value; the last group may be short."""
    whole = values.shape[1] // group
    operation(values[:, : whole * group].unflatten(1, (whole, group)), per_group[:, :whole, None])
    operation(values[:, whole * group :], per_group[:, whole:])


def per_column(per_group: Tensor, group: int | None, count: int) -> Tensor:
    """Repeat one value per group, [rows, groups], over the `count` columns of a run; the last group may be short."""
    if group is None:
        return per_group.expand(-1, count)
    return per_group.repeat_interleave(group, dim=1)[:, :count]


def _levels(codebook: Codebook, device: torch.device) -> Float[Tensor, "256 per_byte"]:
    """The levels of the codes in each possible byte."""
    levels = torch.tensor(codebook.levels, device=device)
    return levels[digits(len(codebook.levels), codebook.per_byte, device)]


def _floats(stored: UInt8[Tensor, "rows nbytes"], dtype: torch.dtype) -> Float[Tensor, "rows n"]:
    """Floats that are stored as bytes; copied first, since in a single row they may begin at an odd byte."""
    return stored.clone(memory_format=torch.contiguous_format).view(dtype)
