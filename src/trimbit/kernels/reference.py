"""Every operation on packed weights in plain PyTorch: the definition of correct for faster kernels."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from trimbit.kernels.pack import digits, spread, unpack
from trimbit.precision import BFloat16, Codebook, Run


def dequantize(
    codes: UInt8[Tensor, "rows code_nbytes"],
    scales: Float[Tensor, "rows groups"],
    zeros: UInt8[Tensor, "rows zero_nbytes"] | None,
    runs: tuple[Run, ...],
    dtype: torch.dtype,
) -> Float[Tensor, "rows cols"]:
    """The weight behind packed codes; groups restart at each run.

    s * c; s * (c - z) where there is a zero point; s * level[c] for a codebook; m + s * level[c] where it has a mean.
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
        groups = precision.groups(count)
        scale = scales[:, at_scale : at_scale + groups]
        at_scale += groups
        shift = None
        if nbytes := precision.zero_nbytes(count):
            shift = zeros[:, at_zero : at_zero + nbytes]  # type: ignore[index]
            at_zero += nbytes
        if isinstance(precision, Codebook):
            level = spread(raw, _levels(precision, dtype, codes.device))[:, :count]
            if shift is None:
                pieces.append(level * per_column(scale.to(dtype), precision.group, count))
                continue
            mean = _floats(shift, torch.float16).float()  # m and s may cancel: one rounding, of their sum
            reach = level.float() * per_column(scale.float(), precision.group, count)
            pieces.append((per_column(mean, precision.group, count) + reach).to(dtype))
            continue
        value = unpack(raw, precision.bits, count).to(torch.int16)
        if shift is None:
            value = value - 2 ** (precision.bits - 1)
        else:
            zero = unpack(shift, precision.bits, groups)
            value = value - per_column(zero, precision.group, count).to(torch.int16)
        pieces.append(value.to(dtype) * per_column(scale.to(dtype), precision.group, count))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def per_column(per_group: Tensor, group: int | None, count: int) -> Tensor:
    """Spread one value a group, [rows, groups], over the `count` columns of a run; the last group may be short."""
    if group is None:
        return per_group.expand(-1, count)
    return per_group.repeat_interleave(group, dim=1)[:, :count]


def _levels(codebook: Codebook, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "256 per_byte"]:
    """The levels of the codes of each byte."""
    levels = torch.tensor(codebook.levels, dtype=dtype, device=device)
    return levels[digits(len(codebook.levels), codebook.per_byte, device)]


def _floats(stored: UInt8[Tensor, "rows nbytes"], dtype: torch.dtype) -> Float[Tensor, "rows n"]:
    """Values that are stored as bytes; a copy, for in a lone row they may begin at an odd byte."""
    return stored.clone(memory_format=torch.contiguous_format).view(dtype)
