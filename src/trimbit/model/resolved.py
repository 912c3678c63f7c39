"""The resolved plan: a plan and a layout, joined into one table of every unit, weight and site as stored.

All code that counts bytes, cuts modules, builds the skeleton of a compressed model or prints a plan reads this table.
Only here are bytes counted, and are plans refused that do not fit their model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from trimbit.errors import PlanError
from trimbit.model import axes
from trimbit.model.channels import ALL, Channels, Index, cut_channels, order_dtype, stored_channels
from trimbit.model.layout import Layout, Unit, Weight
from trimbit.model.shards import TensorSpec, shard_nbytes, shards
from trimbit.model.sizes import check_kv_cache
from trimbit.schema.activations import ActRun
from trimbit.schema.plan import Plan
from trimbit.schema.precision import BFloat16, Run, code_row_nbytes, group_count, zero_row_nbytes
from trimbit.schema.structure import Structure


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedWeight:
    """A weight as it is stored."""

    origin: Weight
    shape: tuple[int, int]
    runs: tuple[Run, ...]  # along its columns
    rows: Index | None  # original indices, in stored order; None: all, in original order
    cols: Index | None
    refit: bool  # gains a bias
    rank: int  # of its low-rank pair; 0: no pair

    @property
    def name(self) -> str:
        """The path of its module."""
        return self.origin.name

    @property
    def bias(self) -> bool:
        """Whether it has a bias, from the original or from the refit."""
        return self.origin.bias or self.refit

    @property
    def plain(self) -> bool:
        """Whether it is stored unquantised, as a bf16 matrix."""
        return len(self.runs) == 1 and isinstance(self.runs[0].precision, BFloat16)

    def tensors(self) -> dict[str, TensorSpec]:
        """Its stored tensors, by name."""
        name, (rows, cols) = self.name, self.shape
        specs = {f"{name}.bias": TensorSpec("BF16", (rows,))} if self.bias else {}
        if self.rank:
            specs[f"{name}.adapter.a"] = TensorSpec("BF16", (self.rank, cols))
            specs[f"{name}.adapter.b"] = TensorSpec("BF16", (rows, self.rank))
        if self.plain:
            return {**specs, f"{name}.weight": TensorSpec("BF16", (rows, cols))}
        specs[f"{name}.codes"] = TensorSpec("U8", (rows, code_row_nbytes(self.runs)))
        specs[f"{name}.scales"] = TensorSpec("F16", (rows, group_count(self.runs)))
        if zeros := zero_row_nbytes(self.runs):
            specs[f"{name}.zeros"] = TensorSpec("U8", (rows, zeros))
        return specs


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSite:
    """How an input of a block's weights is reordered and rounded while the model runs."""

    module: str  # where the input is changed
    at_output: bool  # True: at the module's output (a norm); False: at its input (a weight)
    gather: Index | None  # the stored order; None: no order, or one folded into the weights
    acts: tuple[ActRun, ...]

    def stored(self) -> dict[str, Tensor]:
        """The stored order, by the name of its tensor; empty if there is none."""
        return {} if self.gather is None else {f"{self.module}.order": self.gather}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedUnit:
    """A unit as it is stored; a dropped unit has no weights, sites or vectors."""

    origin: Unit
    width: int | None  # kept members of its dim; None: it has no dim
    keep: tuple[int, ...] | None  # their original indices, as in the plan; None: all
    weights: Mapping[str, ResolvedWeight] = field(default_factory=dict)
    sites: Mapping[str, ResolvedSite] = field(default_factory=dict)
    vectors: Mapping[str, int] = field(default_factory=dict)  # lengths of its norms and vectors

    @property
    def dropped(self) -> bool:
        """Whether the whole unit is dropped."""
        return self.width == 0

    def tensors(self) -> dict[str, TensorSpec]:
        """Its stored tensors, by name."""
        specs: dict[str, TensorSpec] = {}
        for weight in self.weights.values():
            site = self.sites.get(weight.origin.site)
            specs |= weight.tensors()
            for name, order in site.stored().items() if site else ():
                specs[name] = TensorSpec("I16" if order.dtype == torch.int16 else "I32", tuple(order.shape))
        return specs | {name: TensorSpec("BF16", (length,)) for name, length in self.vectors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of its stored tensors."""
        return sum(spec.nbytes for spec in self.tensors().values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A compressed model, unit by unit in the order of the original."""

    structure: Structure  # the part stored in config.json
    units: Mapping[str, ResolvedUnit]
    fixed: Mapping[str, tuple[int, ...]]  # shapes of the parameters that no plan changes

    @property
    def weights(self) -> dict[str, ResolvedWeight]:
        """The kept weights, by name."""
        return {name: weight for unit in self.units.values() for name, weight in unit.weights.items()}

    def tensors(self) -> dict[str, TensorSpec]:
        """All stored tensors, by name."""
        specs = {name: spec for unit in self.units.values() for name, spec in unit.tensors().items()}
        return specs | {name: TensorSpec("BF16", shape) for name, shape in self.fixed.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(spec.nbytes for spec in self.tensors().values())

    @property
    def file_nbytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(shard_nbytes(shard) for shard in shards(self.tensors()))


def resolve(plan: Plan, layout: Layout) -> Resolved:
    """Join a plan with the layout of its model.

    Raises:
        PlanError: if the plan does not fit, naming the dim, weight or site and the two numbers that disagree.
    """
    for dim, keep in plan.cuts.items():
        _check_cut(dim, keep, layout.unit_of_dim(dim).size, rotated=plan.rotation is not None)
    channels = {
        name: stored_channels(layout, unit, plan)
        for name, unit in layout.units.items()
        if plan.cuts.get(unit.dim or "") != ()
    }
    stored = {site for own in channels.values() for site in own.gathers}
    structure = Structure(
        widths=plan.widths, weights=plan.weights, biases=plan.biases, adapters=plan.adapters,
        gathers=tuple(site for site in plan.orders if site in stored), acts=plan.acts, rotation=plan.rotation,
        kv_cache=plan.kv_cache,
    )  # fmt: skip
    resolved = join(structure, layout, channels)
    _check(resolved, plan, layout)
    return resolved


def join(
    structure: Structure, layout: Layout, channels: Mapping[str, Channels] = MappingProxyType({})
) -> Resolved:  # fmt: skip
    """Join a structure with a layout, unchecked; `channels` are unknown if the structure comes from config.json."""
    units = {
        name: resolve_unit(layout, unit, structure, channels.get(name, ALL)) for name, unit in layout.units.items()
    }
    return Resolved(structure=structure, units=units, fixed={name: layout.shapes[name] for name in layout.fixed})


def cut_alone(layout: Layout, unit: Unit, keep: tuple[int, ...]) -> ResolvedUnit:
    """A unit cut to these indices of its dim, without formats."""
    structure = Structure(widths={unit.dim or "": len(keep)}, weights={})
    return resolve_unit(layout, unit, structure, cut_channels(layout, unit, keep))


def resolve_unit(layout: Layout, unit: Unit, structure: Structure, channels: Channels = ALL) -> ResolvedUnit:
    """One unit of a structure, unchecked; stored orders that `channels` lacks are filled with zeros."""
    width = structure.widths.get(unit.dim, unit.size) if unit.dim is not None else None
    if width == 0:
        return ResolvedUnit(origin=unit, width=0, keep=())
    weights: dict[str, ResolvedWeight] = {}
    sites: dict[str, ResolvedSite] = {}
    for name in unit.weights:
        weight = layout.weights[name]
        weights[name] = ResolvedWeight(
            origin=weight, shape=layout.weight_shape(weight, width), runs=structure.weights.get(name, ()),
            rows=channels.rows.get(name), cols=channels.cols.get(name), refit=name in structure.biases,
            rank=structure.adapters.get(name, 0),
        )  # fmt: skip
        if unit.block is not None and weight.site not in sites:
            gather = channels.gathers.get(weight.site)
            if gather is None and weight.site in structure.gathers:
                cols = weights[name].shape[1]
                gather = torch.zeros(cols, dtype=order_dtype(cols))
            module, at_output = layout.input_of(weight.site)
            acts = structure.acts.get(weight.site, ())
            sites[weight.site] = ResolvedSite(module=module, at_output=at_output, gather=gather, acts=acts)
    sizes = layout.cut_sizes(unit, width)
    vectors = {name: axes.length(axis, sizes) for name, axis in unit.kept}
    return ResolvedUnit(origin=unit, width=width, keep=channels.keep, weights=weights, sites=sites, vectors=vectors)


def _check_cut(dim: str, keep: tuple[int, ...], size: int, *, rotated: bool) -> None:
    if len(set(keep)) != len(keep) or not 0 <= min(keep, default=0) <= max(keep, default=0) < size:
        raise PlanError(f"{dim}: kept indices must be distinct and below {size}")
    if rotated and dim.endswith(".mid") and keep not in {(), tuple(range(size))}:
        raise PlanError(
            f"{dim}: {len(keep)} of {size} channels are kept, but a rotated plan must keep all or none, since its "
            "rotation mixes them; cut this dim in a plan without a rotation"
        )


def _check(resolved: Resolved, plan: Plan, layout: Layout) -> None:
    alive, sites = resolved.weights, {site for unit in resolved.units.values() for site in unit.sites}
    for name in sorted(alive.keys() ^ plan.weights.keys()):
        why = "has no runs in the plan" if name in alive else "is not in this model, or its sub-block is dropped"
        raise PlanError(f"weight {name} {why}")
    for name, weight in alive.items():
        count, cols = sum(run.count for run in weight.runs), weight.shape[1]
        if count != cols:
            raise PlanError(f"weight {name}: runs cover {count} input channels, but {cols} are kept")
    for name in plan.biases:
        if name not in alive or name not in {unit.out_weight for unit in layout.units.values()}:
            raise PlanError(
                f"weight {name} cannot gain a bias: only kept weights that write to the residual stream can"
            )
    for name, rank in plan.adapters.items():
        if name not in alive or alive[name].origin.site not in sites:
            raise PlanError(f"weight {name} cannot have a low-rank pair: only kept weights of the blocks can")
        most = min(alive[name].shape)
        if not 1 <= rank <= most:
            raise PlanError(f"weight {name}: the low-rank pair has rank {rank}, but the rank must be 1 to {most}")
    for site in sorted({*plan.orders, *plan.acts} - sites):
        raise PlanError(f"site {site} cannot have an order or rounded inputs: no kept weight of a block reads it")
    for name, weight in alive.items():
        site = weight.origin.site
        counts, own = [run.count for run in plan.acts.get(site, ())], [run.count for run in weight.runs]
        if site in plan.acts and own != counts:
            raise PlanError(
                f"site {site}: its inputs are rounded in runs of {counts}, but weight {name} has runs of {own}"
            )
    check_kv_cache(plan.kv_cache, layout.config)
