"""Ordinal variables under a known budget: points that fit, and their neighbours.

A point gives every variable a level, and every level costs a whole number of bytes.
"""

from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from jaxtyping import Float64
from torch import Tensor

T = TypeVar("T")
Point = tuple[int, ...]  # a level of each variable


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """The space: for each variable the bytes and the ordinal value of its levels, the cheapest first; and the limit."""

    costs: tuple[tuple[int, ...], ...]
    values: tuple[tuple[float, ...], ...]
    room_nbytes: int

    def __post_init__(self) -> None:
        assert [len(costs) for costs in self.costs] == [len(values) for values in self.values]
        assert all(costs and list(costs) == sorted(costs) for costs in self.costs)

    @property
    def lowest(self) -> Point:
        """The point of fewest bytes."""
        return (0,) * len(self.costs)

    def nbytes(self, point: Point) -> int:
        """Bytes of a point."""
        return sum(costs[level] for costs, level in zip(self.costs, point, strict=True))

    def fits(self, point: Point) -> bool:
        """Whether a point is within the limit."""
        return self.nbytes(point) <= self.room_nbytes

    def features(self, points: Sequence[Point]) -> Float64[Tensor, "points variables"]:
        """The values of points, each variable scaled to [0, 1]."""
        scaled = [[(v - min(vs)) / ((max(vs) - min(vs)) or 1.0) for v in vs] for vs in self.values]
        rows = [[own[level] for own, level in zip(scaled, point, strict=True)] for point in points]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(points), len(self.costs))


def _settle(box: Box, point: Point, generator: torch.Generator, fixed: int | None = None) -> Point:
    """Lower random variables until the point fits, then raise random ones while it still fits; `fixed` stays."""
    levels, left = list(point), box.room_nbytes - box.nbytes(point)
    for step in (-1, 1) if left < 0 else (1,):
        room = [level if step < 0 else len(c) - 1 - level for c, level in zip(box.costs, levels, strict=True)]
        moves = [i for i, count in enumerate(room) for _ in range(count) if i != fixed]
        for at in torch.randperm(len(moves), generator=generator).tolist():
            i = moves[at]
            more = box.costs[i][levels[i] + step] - box.costs[i][levels[i]]
            if more <= left if step > 0 else left < 0:
                levels[i] += step
                left -= more
    return tuple(levels)


def _steps(box: Box, point: Point) -> list[tuple[int, Point]]:
    """All moves of one variable by one level, within the limit or not, each with the variable's index."""
    return [
        (i, (*point[:i], to, *point[i + 1 :]))
        for i, level in enumerate(point)
        for to in (level - 1, level + 1)
        if 0 <= to < len(box.costs[i])
    ]


def neighbours(box: Box, point: Point, near: int, generator: torch.Generator) -> list[Point]:
    """Neighbours of a point that fit.

    These are all single steps; up to `near` random steps after which the other variables are settled; and up to `near`
    random swaps, where one variable goes down and another goes up.
    """
    steps = _steps(box, point)
    found = [moved for _, moved in steps]
    found += [_settle(box, moved, generator, fixed) for fixed, moved in _some(steps, near, generator)]
    downs = [i for i, level in enumerate(point) if level > 0]
    ups = [i for i, level in enumerate(point) if level < len(box.costs[i]) - 1]
    pairs = [(i, j) for i, j in product(downs, ups) if i != j]
    for down, up in _some(pairs, near, generator):
        found.append(tuple(level - (i == down) + (i == up) for i, level in enumerate(point)))
    return [moved for moved in dict.fromkeys(found) if moved != point and box.fits(moved)]


def _some(of: Sequence[T], count: int, generator: torch.Generator) -> list[T]:
    """Up to `count` random elements."""
    return [of[at] for at in torch.randperm(len(of), generator=generator)[:count].tolist()]


def feasible_points(box: Box, count: int, generator: torch.Generator, tried: Set[Point] = frozenset()) -> list[Point]:
    """Up to `count` distinct random points that fit and were not tried; fewer only if there are no more.

    First come points where nothing more fits; when these run out, points a step away from them, and so on.
    """
    assert box.fits(box.lowest), "nothing fits"
    seen: dict[Point, None] = {}
    for _ in range(2 * count + 16):
        if len(seen.keys() - tried) >= count:
            break
        seen[_settle(box, box.lowest, generator)] = None
    queue = deque(seen)
    while queue and len(seen.keys() - tried) < count:  # single steps connect all points that fit
        near = [moved for _, moved in _steps(box, queue.popleft()) if moved not in seen and box.fits(moved)]
        seen |= dict.fromkeys(near)
        queue += near
    return [point for point in seen if point not in tried][:count]
