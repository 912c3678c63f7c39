"""Named axes of a weight: the flat indices that a cut keeps, and their order.

An axis is written as `kv*g*d` (factors, slowest first) or `kv*g*d+kv*d+kv*d` (fused parts, one after the other).
"""

from collections.abc import Mapping
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor


def parts(axis: str) -> list[list[str]]:
    """The fused parts of an axis, each a list of factors."""
    return [part.split("*") for part in axis.split("+")]


def length(axis: str, sizes: Mapping[str, int]) -> int:
    """Number of channels along an axis, given the size of each factor."""
    return sum(prod(sizes[factor] for factor in part) for part in parts(axis))


def mentions(axis: str, dim: str) -> bool:
    """Whether a cut of `dim` shortens this axis."""
    return any(dim in part for part in parts(axis))


def members(axis: str, sizes: Mapping[str, int], dim: str) -> Int[Tensor, " channels"]:
    """The index along `dim` that each channel of `axis` belongs to; -1 in parts without that factor."""
    pieces = []
    for part in parts(axis):
        shape = [sizes[factor] for factor in part]
        if dim not in part:
            pieces.append(torch.full((prod(shape),), -1))
            continue
        at = part.index(dim)
        view = [-1 if axis_at == at else 1 for axis_at in range(len(shape))]
        pieces.append(torch.arange(shape[at]).view(view).expand(shape).flatten())
    return torch.cat(pieces)


def within_heads(order: Int[Tensor, " n"], sizes: Mapping[str, int]) -> Int[Tensor, "kv dv"] | None:
    """Reduce an order of the axis `kv*g*dv` to one order of the value channels per KV group; None if impossible.

    It is possible if every channel stays in its head, and the heads of a group have the same order.
    """
    kv, g, dv = (sizes[factor] for factor in ("kv", "g", "dv"))
    inside = order.view(kv * g, dv) - torch.arange(kv * g)[:, None] * dv
    own = inside.view(kv, g, dv)
    fits = inside.ge(0).all() and inside.lt(dv).all() and (own == own[:, :1]).all()
    return own[:, 0] if fits else None


def head_indices(axis: str, sizes: Mapping[str, int], inside: Int[Tensor, "kv dv"]) -> Int[Tensor, " n"]:
    """Flat indices along `axis`, in stored order, if each KV group's value channels take the order `inside`."""
    offset, pieces = 0, []
    for part in parts(axis):
        shape = [sizes[factor] for factor in part]
        grid = torch.arange(prod(shape)).view(shape)
        if part[-1] == "dv":  # after kv, and perhaps g
            spread = inside.view(inside.shape[0], *[1] * (len(part) - 2), -1).expand(shape)
            grid = grid.take_along_dim(spread, -1)
        pieces.append(grid.flatten() + offset)
        offset += prod(shape)
    return torch.cat(pieces)


def kept_indices(axis: str, sizes: Mapping[str, int], dim: str, keep: Int[Tensor, " members"]) -> Int[Tensor, " kept"]:
    """Kept flat indices along `axis`, in stored order, if `dim` keeps the indices `keep`."""
    offset, pieces = 0, []
    for part in parts(axis):
        shape = [sizes[factor] for factor in part]
        grid = torch.arange(prod(shape)).view(shape)
        if dim in part:
            grid = grid.index_select(part.index(dim), keep)
        pieces.append(grid.flatten() + offset)
        offset += prod(shape)
    return torch.cat(pieces)
