"""The original channels that each weight of a unit keeps under a plan, in stored order."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from trimbit.errors import PlanError
from trimbit.model import axes
from trimbit.model.layout import Layout, Unit
from trimbit.schema.plan import Plan

Index = Int[Tensor, "_"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """Kept original rows and columns of a unit's weights, in stored order; a weight without an entry keeps all."""

    keep: tuple[int, ...] | None = None  # kept indices of the unit's dim, as in the plan; None: all
    rows: Mapping[str, Index] = field(default_factory=dict)
    cols: Mapping[str, Index] = field(default_factory=dict)
    # by site: stored orders, those that cannot be folded into weights
    gathers: Mapping[str, Index] = field(default_factory=dict)


ALL = Channels()


def cut_channels(layout: Layout, unit: Unit, keep: tuple[int, ...]) -> Channels:
    """The channels of a unit whose dim keeps these indices, in this order."""
    index = torch.tensor(keep, dtype=torch.long)

    def kept(axes_of: dict[str, str]) -> dict[str, Index]:
        cut = {name: axis for name, axis in axes_of.items() if axes.mentions(axis, unit.factor)}
        return {name: axes.kept_indices(axis, layout.sizes, unit.factor, index) for name, axis in cut.items()}

    weights = [layout.weights[name] for name in unit.weights]
    rows, cols = kept({w.name: w.row_axis for w in weights}), kept({w.name: w.col_axis for w in weights})
    return Channels(keep=keep, rows=rows, cols=cols)


def stored_channels(layout: Layout, unit: Unit, plan: Plan) -> Channels:
    """The channels of a unit after the cuts and orders of a plan; the cut is taken to be valid.

    Raises:
        PlanError: if an order is not a permutation of the kept channels of its site.
    """
    keep = plan.cuts.get(unit.dim or "")
    cut = ALL if keep is None else cut_channels(layout, unit, keep)
    rows, cols, gathers = dict(cut.rows), dict(cut.cols), {}
    sizes = layout.cut_sizes(unit, None if keep is None else len(keep))
    for site in dict.fromkeys(layout.weights[name].site for name in unit.weights):
        if site not in plan.orders or not (readers := layout.readers(site)):
            continue
        order = torch.tensor(plan.orders[site], dtype=torch.long)
        count = axes.length(readers[0].col_axis, sizes)
        if not torch.equal(order.sort().values, torch.arange(count)):
            raise PlanError(f"site {site}: an order must be a permutation of its {count} kept channels")
        for weight in readers:
            cols[weight.name] = cols[weight.name][order] if weight.name in cols else order
        folded = _folded_rows(layout, site, order, sizes, rotated=plan.rotation is not None)
        if folded is None:
            gathers[site] = order.to(order_dtype(count))
        for name, index in (folded or {}).items():
            rows[name] = rows[name][index] if name in rows else index
    return Channels(keep=keep, rows=rows, cols=cols, gathers=gathers)


def _folded_rows(
    layout: Layout, site: str, order: Index, sizes: Mapping[str, int], *, rotated: bool
) -> dict[str, Index] | None:
    """Indices that reorder the rows of the weights that write a site; None if the order cannot be folded into them.

    It can in a feed-forward sub-block, unless its channels are rotated while the model runs, and in attention if the
    channels of V stay in their heads.
    """
    first = layout.readers(site)[0]
    unit = layout.units[first.unit]
    writers = {name: layout.weights[name].row_axis for name in unit.weights if layout.weights[name].site != site}
    if first.col_axis == "mid":
        folds = {} if rotated else writers
        return {name: axes.kept_indices(axis, sizes, "mid", order) for name, axis in folds.items()} or None
    inside = axes.within_heads(order, sizes) if axes.mentions(first.col_axis, "dv") else None
    if inside is None:
        return None
    return {name: axes.head_indices(axis, sizes, inside) for name, axis in writers.items() if axes.mentions(axis, "dv")}


def order_dtype(count: int) -> torch.dtype:
    """The dtype of a stored order of `count` channels."""
    return torch.int16 if count <= 2**15 else torch.int32
