"""Rounding of activations in plain PyTorch: the definition of correct for faster kernels."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from trimbit.precision import ActInt, ActRun


def take_channels(
    x: Shaped[Tensor, "*batch channels"], order: Int[Tensor, " chosen"]
) -> Shaped[Tensor, "*batch chosen"]:
    """x[..., order], by `gather`: on the CPU several times as fast as by an index."""
    return x.gather(-1, order.long().expand(*x.shape[:-1], -1))


def round_activations(
    x: Float[Tensor, "*batch channels"], runs: tuple[ActRun, ...]
) -> Float[Tensor, "*batch channels"]:
    """The values that x stands for once each token and group is rounded; groups restart at each run.

    Scales are fp32, the result has x's type. Gradients pass as if nothing had been rounded (straight through).
    """
    parts = x.split([run.count for run in runs], dim=-1)
    return torch.cat([_rounded(part, run.precision) for part, run in zip(parts, runs, strict=True)], dim=-1)


def round_among(
    x: Float[Tensor, "*batch channels"], precision: ActInt, counted: Bool[Tensor, " channels"]
) -> Float[Tensor, "*batch channels"]:
    """As `round_activations` in one run, but that only the counted channels of a group decide its scale.

    The others are clipped to what it reaches. In a group without a counted one all are.
    """
    group = precision.group or x.shape[-1]
    among = functional.pad(counted, (0, -len(counted) % group)).unflatten(0, (-1, group))
    return _nearest(x, precision, among | ~among.any(-1, keepdim=True))


def _rounded(x: Tensor, precision: ActInt | None) -> Tensor:
    if precision is None:
        return x
    found: Tensor = _StraightThrough.apply(x, precision)  # type: ignore[no-untyped-call]
    return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, precision: ActInt) -> Tensor:  # noqa: ANN401
        return _nearest(x, precision)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grad, None


def _nearest(x: Tensor, precision: ActInt, counted: Tensor | None = None) -> Tensor:
    count = x.shape[-1]
    group = precision.group or count
    top = 2 ** (precision.bits - 1) - 1
    groups = functional.pad(x.float(), (0, -count % group)).unflatten(-1, (-1, group))
    sizes = groups.abs() if counted is None else groups.abs() * counted
    scale = sizes.amax(-1, keepdim=True) * (precision.clip / top)
    codes = (groups / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-top - 1, top)
    rounded: Tensor = codes.mul_(scale).flatten(-2)[..., :count].to(x.dtype)
    return rounded
