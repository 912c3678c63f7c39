"""Gathering channels and rounding activations in plain PyTorch: the reference for faster kernels."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from trimbit.schema.activations import ActInt, ActRun


def take_channels(
    x: Shaped[Tensor, "*batch channels"], order: Int[Tensor, " chosen"]
) -> Shaped[Tensor, "*batch chosen"]:
    """x[..., order], by `gather`: on the CPU several times faster than indexing."""
    return x.gather(-1, order.long().expand(*x.shape[:-1], -1))


def round_activations(
    x: Float[Tensor, "*batch channels"], runs: tuple[ActRun, ...]
) -> Float[Tensor, "*batch channels"]:
    """Round x, with one scale for each group of each token; groups restart at each run.

    Scales are fp32; the result has the dtype of x. Gradients pass straight through, as if nothing were rounded.
    """
    parts = x.split([run.count for run in runs], dim=-1)
    return torch.cat([_rounded(part, run.precision) for part, run in zip(parts, runs, strict=True)], dim=-1)


def round_among(
    x: Float[Tensor, "*batch channels"], precision: ActInt, counted: Bool[Tensor, " channels"]
) -> Float[Tensor, "*batch channels"]:
    """As `round_activations` with one run of only the counted channels, or of all channels if none is counted.

    Any other channel is rounded with the scale of the group at its place, and clipped to its range.
    """
    if not counted.any():
        counted = torch.ones_like(counted)
    x32, group = x.float(), precision.group or x.shape[-1]
    own = counted.nonzero()[:, 0]
    scale = _scales(_grouped(take_channels(x32, own), group), precision).squeeze(-1)
    place = (counted.cumsum(0) - counted.long()).clamp(max=len(own) - 1)
    return _on_grid(x32, take_channels(scale, place // group), precision).to(x.dtype)


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


def _nearest(x: Tensor, precision: ActInt) -> Tensor:
    n_groups = _grouped(x.float(), precision.group or x.shape[-1])
    rounded = _on_grid(n_groups, _scales(n_groups, precision), precision)
    return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def _grouped(x: Tensor, group: int) -> Float[Tensor, "*batch groups group"]:
    n_groups: Tensor = functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    return n_groups


def _scales(n_groups: Tensor, precision: ActInt) -> Float[Tensor, "*batch groups 1"]:
    half: int = 2 ** (precision.bits - 1)
    return n_groups.abs().amax(-1, keepdim=True) * (precision.clip / (half - 1))


def _on_grid(x: Tensor, scale: Tensor, precision: ActInt) -> Tensor:
    half: int = 2 ** (precision.bits - 1)
    return (x / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-half, half - 1).mul_(scale)
