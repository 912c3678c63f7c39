"""Every operation on packed weights in plain PyTorch: the definition of correct for faster kernels."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from trimbit.kernels.pack import spread, unpack
from trimbit.precision import NF4_LEVELS, BFloat16, NormalFloat, Run


def dequantize(
    codes: UInt8[Tensor, "rows code_nbytes"],
    scales: Float[Tensor, "rows groups"],
    zeros: UInt8[Tensor, "rows zero_nbytes"] | None,
    runs: tuple[Run, ...],
    dtype: torch.dtype,
) -> Float[Tensor, "rows cols"]:
    """The weight behind packed codes; groups restart at each run.

    s * c; s * (c - z) where there is a zero point; s * level[c] for NF4.
    """
    pieces: list[Tensor] = []
    at_code = at_scale = at_zero = 0
    for run in runs:
        precision, count = run.precision, run.count
        raw = codes[:, at_code : at_code + precision.code_nbytes(count)]
        at_code += raw.shape[1]
        if isinstance(precision, BFloat16):
            pieces.append(raw.contiguous().view(torch.bfloat16).to(dtype))
            continue
        groups = precision.groups(count)
        scale = scales[:, at_scale : at_scale + groups]
        at_scale += groups
        if isinstance(precision, NormalFloat):
            level = spread(raw, _nf4_pairs(dtype, codes.device))[:, :count]
            pieces.append(level * per_column(scale.to(dtype), precision.group, count))
            continue
        value = unpack(raw, precision.bits, count).to(torch.int16)
        if precision.symmetric:
            value = value - 2 ** (precision.bits - 1)
        else:
            packed_zeros = zeros[:, at_zero : at_zero + precision.zero_nbytes(count)]  # type: ignore[index]
            at_zero += packed_zeros.shape[1]
            zero = unpack(packed_zeros, precision.bits, groups)
            value = value - per_column(zero, precision.group, count).to(torch.int16)
        pieces.append(value.to(dtype) * per_column(scale.to(dtype), precision.group, count))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def per_column(per_group: Tensor, group: int | None, count: int) -> Tensor:
    """Spread one value a group, [rows, groups], over the `count` columns of a run; the last group may be short."""
    if group is None:
        return per_group.expand(-1, count)
    return per_group.repeat_interleave(group, dim=1)[:, :count]


def _nf4_pairs(dtype: torch.dtype, device: torch.device) -> Float[Tensor, "256 2"]:
    """The two levels of each byte of NF4 codes."""
    levels, octet = torch.tensor(NF4_LEVELS, dtype=dtype, device=device), torch.arange(256, device=device)
    return torch.stack([levels[octet % 16], levels[octet // 16]], dim=1)
