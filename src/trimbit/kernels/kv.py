"""Quantised keys and values in plain PyTorch: the reference for faster kernels.

Each group of channels of each token and head has its scale and minimum: x ~ s * c + m, with c in [0, 2^b - 1].
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from trimbit.errors import NumericsError
from trimbit.kernels.pack import pack, unpack
from trimbit.kernels.weights import per_column
from trimbit.schema.kv_cache import KVPrecision


def quantize_tokens(
    x: Float[Tensor, "*tokens channels"], precision: KVPrecision
) -> tuple[UInt8[Tensor, "*tokens nbytes"], Float[Tensor, "*tokens groups"], Float[Tensor, "*tokens groups"]]:
    """Packed codes, scales and minima (both fp16) of each token in each head.

    The grid spans a group's range: m = min and s = (max - m) / (2^b - 1), both rounded to fp16 before use.

    Raises:
        NumericsError: if a scale or minimum is not finite in fp16.
    """
    channels, group = x.shape[-1], precision.group
    flat = x.detach().float().flatten(0, -2)
    parts, top = flat.split(group or channels, dim=1), 2**precision.bits - 1
    minima = torch.stack([part.amin(1) for part in parts], dim=1).half()
    maxima = torch.stack([part.amax(1) for part in parts], dim=1)
    scales = ((maxima - minima.float()) / top).clamp(min=0).half()
    if not bool((minima.isfinite() & scales.isfinite()).all()):
        raise NumericsError(
            "a key or value is not finite, or does not fit fp16, so the KV cache cannot be quantised; "
            "use an exact cache"
        )
    safe = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    above = flat - per_column(minima.float(), group, channels)
    codes = (above / per_column(safe, group, channels)).round_().clamp_(0, top)
    packed = pack(codes.to(torch.uint8), precision.bits)
    return tuple(part.view(*x.shape[:-1], -1) for part in (packed, scales, minima))  # type: ignore[return-value]


def dequantize_tokens(
    codes: UInt8[Tensor, "*tokens nbytes"],
    scales: Float[Tensor, "*tokens groups"],
    minima: Float[Tensor, "*tokens groups"],
    precision: KVPrecision,
    channels: int,
    dtype: torch.dtype,
) -> Float[Tensor, "*tokens channels"]:
    """The keys or values of packed codes, computed in fp32."""
    value = unpack(codes.flatten(0, -2), precision.bits, channels).float()
    value = value * per_column(scales.flatten(0, -2).float(), precision.group, channels)
    value = value + per_column(minima.flatten(0, -2).float(), precision.group, channels)
    return value.to(dtype).view(*codes.shape[:-1], channels)
