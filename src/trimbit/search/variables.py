"""Formats as levels of ordinal variables, by block, sub-block, site or weight, for searches over bits alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trimbit.measure.choices import sites_of, spared_format
from trimbit.model.layout import header_bound
from trimbit.model.resolved import resolve
from trimbit.schema.plan import Plan
from trimbit.schema.precision import Precision, Run, row_nbytes
from trimbit.search.problem import Problem

Per = Literal["block", "unit", "site", "weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variables:
    """Variables by name, the sites or weights that each covers, and its bytes at each level, smallest format first."""

    problem: Problem
    formats: tuple[Precision, ...]
    covers: Mapping[str, tuple[str, ...]]  # sites, or weights
    layers: tuple[str, ...]  # for each variable, the layer whose importance it has: `blocks.7`, or its sub-block
    costs: tuple[tuple[int, ...], ...]
    room_nbytes: int  # the budget less the rest of the file

    def plan(self, point: Sequence[int], method: str) -> Plan:
        """The plan with the levels of a point."""
        layout = self.problem.layout
        chosen = zip(self.covers.values(), point, strict=True)
        formats = {one: self.formats[level] for covered, level in chosen for one in covered}
        for unit in layout.units.values():
            own = (
                self.problem.space.embedding_formats[0]
                if unit.block is None
                else spared_format(unit, self.problem.space)
            )
            if own is not None:
                formats |= dict.fromkeys(sites_of(layout, unit), own)
        return self.problem.plan({}, formats, method)

    def share(self, of: float) -> int:
        """Bytes of the file with this share of the variables at the highest level: those whose upgrade costs most."""
        upgrades = sorted((costs[-1] - costs[0] for costs in self.costs), reverse=True)
        used = sum(costs[0] for costs in self.costs) + sum(upgrades[: round(of * len(upgrades))])
        return self.problem.budget_nbytes - self.room_nbytes + used


def variables(problem: Problem, per: Per) -> Variables:
    """The variables of a problem; widths are fixed before the search, embedding and head take their first format."""
    layout, space = problem.layout, problem.space
    formats = tuple(sorted(space.formats, key=lambda p: row_nbytes((Run(count=512, precision=p),))))
    covers: dict[str, tuple[str, ...]] = {}
    layers: dict[str, str] = {}
    costs: dict[str, list[int]] = {}
    for unit in layout.units.values():
        if unit.block is None or spared_format(unit, space) is not None:
            continue
        width = space.kept.get(unit.dim or "", unit.size)
        for site, names in sites_of(layout, unit).items():
            for name in names:
                key = {"block": f"blocks.{unit.block}", "unit": unit.name, "site": site, "weight": name}[per]
                covered = name if per == "weight" else site
                covers[key] = tuple(dict.fromkeys((*covers.get(key, ()), covered)))
                layers[key] = key if per == "block" else unit.name
                rows, cols = layout.weight_shape(layout.weights[name], width)
                nbytes = [rows * row_nbytes((Run(count=cols, precision=p),)) for p in formats]
                costs[key] = [old + new for old, new in zip(costs.get(key, [0] * len(formats)), nbytes, strict=True)]
    found = Variables(
        problem=problem, formats=formats, covers=covers, layers=tuple(layers.values()),
        costs=tuple(map(tuple, costs.values())), room_nbytes=0,
    )  # fmt: skip
    lowest = found.plan([0] * len(covers), "lowest")
    rest = resolve(lowest, layout).nbytes - sum(cost[0] for cost in found.costs) + header_bound(layout, problem.rank)
    return replace(found, room_nbytes=problem.budget_nbytes - rest)
