"""Pareto sets of bytes and damage."""

from collections.abc import Sequence

PAGE = 4096  # bytes


def front(sizes: Sequence[int], values: Sequence[float]) -> list[int]:
    """Indices of the Pareto set of bytes and damage, the smallest first.

    Of points within 4 KiB only the best stays: such differences are digits in a file's header.
    """
    found: list[int] = []
    begin = 0  # bytes of the first of the points within a page
    for at in sorted(pareto(list(zip(map(float, sizes), values, strict=True))), key=sizes.__getitem__):
        if found and sizes[at] - begin < PAGE:
            found[-1] = at
        else:
            found.append(at)
            begin = sizes[at]
    return found


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point dominates (is at most as large in both, and smaller in one)."""
    return [
        at for at, (a, b) in enumerate(points) if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)
    ]
