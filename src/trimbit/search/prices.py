"""Prices on kinds of choices, by which their damage counts for more or less while a plan is solved for.

Damage adds up only roughly: many cuts, or many formats of few bits, do less or more together than one by one. So plans
are solved for at several prices, each is put together quickly, and prices move on as long as the KL falls.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from trimbit.measure.choices import allowed_formats, allowed_widths
from trimbit.measure.corrected import FEW_BITS
from trimbit.schema.precision import Precision
from trimbit.search.problem import Problem

STEP = 1.5  # ours; smaller steps change the KL by less than an application may, at 2 bits about 5 %
FEW = f"below {FEW_BITS:g} bits"


@dataclass(frozen=True)
class Prices:
    """A factor for each kind of choices, as a number of steps; by default 1."""

    steps: Mapping[str, int] = field(default_factory=dict)

    def of_width(self, dim: str) -> float:
        """The price of cutting a dim."""
        return self._of(_kind(dim))

    def of_format(self, precision: Precision) -> float:
        """The price of a format in a block."""
        return self._of(FEW) if precision.bits < FEW_BITS else 1.0

    def _of(self, kind: str) -> float:
        return float(STEP ** self.steps.get(kind, 0))

    def moved(self, kind: str, steps: int) -> "Prices":
        """The same prices but for one."""
        return Prices({**self.steps, kind: self.steps.get(kind, 0) + steps})

    def __str__(self) -> str:
        return ", ".join(f"{kind} x{self._of(kind):.2g}" for kind, steps in self.steps.items() if steps)


def kinds_of(problem: Problem, *, prune: bool) -> tuple[str, ...]:
    """The kinds that have a price: dims that may be cut, those of most parameters first, and formats of few bits."""
    layout, space = problem.layout, problem.space
    dims: Counter[str] = Counter()
    for unit in layout.units.values():
        if unit.dim is not None and len(allowed_widths(layout, unit, space)) > 1:
            dims[_kind(unit.dim)] += sum(layout.weights[name].rows * layout.weights[name].cols for name in unit.weights)
    blocks = [unit for unit in layout.units.values() if unit.block is not None]
    few = {one.bits < FEW_BITS for unit in blocks for one in allowed_formats(unit, space)}
    return (*(kind for kind, _ in dims.most_common() if prune), *((FEW,) if len(few) > 1 else ()))


def descend(kinds: Sequence[str], kl: Callable[[Prices], float], most: int) -> None:
    """Ask for the KL at prices of 1, then follow one price after the other while it falls, `most` times in all."""
    best, prices, asked = kl(Prices()), Prices(), 1
    every = [(kind, way) for kind in kinds for way in (-1, 1)]
    waiting = list(every)
    while waiting and asked < most:
        kind, way = waiting.pop(0)
        found, asked = kl(prices.moved(kind, way)), asked + 1
        if found < best:
            best, prices = found, prices.moved(kind, way)
            waiting = [(kind, way), *(one for one in every if one[0] != kind)]


def _kind(dim: str) -> str:
    return dim.rpartition(".")[2]
