"""A family row resolved for one config: dims, sizes, weights, units, and the tensors that a plan writes.

Always of the *original* model; `Layout.tensors(plan)` gives what the compressed one holds. This is the one byte count.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig

from trimbit.errors import PlanError
from trimbit.model import axes
from trimbit.model.families import Family
from trimbit.model.shards import TensorSpec, shard_nbytes, shards
from trimbit.model.sizes import check_kv_cache
from trimbit.schema.plan import Plan
from trimbit.schema.precision import BFloat16, Run, code_row_nbytes, group_count, zero_row_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A matrix that can be quantised: `rows x cols`, output by input channels."""

    name: str  # module path, such as model.layers.0.mlp.down_proj
    unit: str  # blocks.0.mlp
    site: str  # blocks.0.mlp.mid: what it reads; weights that share a site share their input
    row_axis: str
    col_axis: str
    rows: int
    cols: int
    bias: bool

    @property
    def role(self) -> str:
        """The last part of the name, such as `down_proj`."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A sub-block, the embedding or the head: what one choice of the search covers."""

    name: str  # blocks.7.attn
    block: int | None
    weights: tuple[str, ...]
    dim: str | None = None  # blocks.7.attn.kv
    size: int = 0  # of the dim
    out_weight: str | None = None  # writes to the residual stream
    module: str | None = None
    kept: tuple[tuple[str, str], ...] = ()  # (parameter, axis) of norms and vectors, in bf16 while the unit lives
    norms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Everything the rest of the code knows about a model's structure."""

    config: PreTrainedConfig
    family: Family
    sizes: Mapping[str, int]
    weights: Mapping[str, Weight]
    units: Mapping[str, Unit]
    fixed: tuple[str, ...]  # parameters that no plan touches, such as the final norm
    tied: bool
    parameters: int  # of the original, tied ones once
    blocks: int
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)  # of every original parameter

    def unit_of_dim(self, dim: str) -> Unit:
        """The unit that a dim belongs to.

        Raises:
            PlanError: if no unit has this dim.
        """
        unit = self.units.get(dim.rsplit(".", 1)[0])
        if unit is None or unit.dim != dim:
            raise PlanError(f"no dim {dim!r} in this model")
        return unit

    def width(self, unit: Unit, plan: Plan) -> int:
        """Channels or KV groups of a unit that a plan keeps."""
        return len(plan.cuts[unit.dim]) if unit.dim in plan.cuts else unit.size

    def dropped(self, unit: Unit, plan: Plan) -> bool:
        """Whether a plan drops the whole unit."""
        return unit.dim is not None and self.width(unit, plan) == 0

    def weight_shape(self, weight: Weight, width: int | None) -> tuple[int, int]:
        """Rows and columns of a weight whose unit keeps `width` of its dim (None: all)."""
        unit = self.units[weight.unit]
        sizes = self.cut_sizes(unit, width)
        return axes.length(weight.row_axis, sizes), axes.length(weight.col_axis, sizes)

    def cut_sizes(self, unit: Unit, width: int | None) -> dict[str, int]:
        """Factor sizes when the unit keeps `width` of its dim."""
        if unit.dim is None or width is None:
            return dict(self.sizes)
        return {**self.sizes, unit.dim.rsplit(".", 1)[1]: width}

    def readers(self, site: str) -> tuple[Weight, ...]:
        """The weights of a block that read a site; none if it is not the site of a block."""
        unit = self.units.get(site.rsplit(".", 1)[0])
        names = () if unit is None or unit.block is None else unit.weights
        return tuple(self.weights[name] for name in names if self.weights[name].site == site)

    def input_of(self, site: str) -> tuple[str, bool]:
        """The module that a site's input is known by, and whether it gives it (a norm) or takes it (a weight)."""
        first = self.readers(site)[0]
        unit = self.units[first.unit]
        at_start = self.weights[unit.weights[0]].site == site
        return (unit.norms[0], True) if at_start else (first.name, False)

    def folded_rows(self, site: str, plan: Plan) -> dict[str, Int[Tensor, " rows"]] | None:
        """Where the rows of the cut weights that write a site go, by weight, if its order folds into them; else None.

        It does in a feed-forward sub-block, unless its channels are rotated while the model runs, and where the
        channels of V stay in their heads.
        """
        order = torch.tensor(plan.orders[site])
        first = self.readers(site)[0]
        unit = self.units[first.unit]
        sizes = self.cut_sizes(unit, self.width(unit, plan))
        writers = {name: self.weights[name].row_axis for name in unit.weights if self.weights[name].site != site}
        if first.col_axis == "mid" and plan.rotation is not None:
            return None
        if first.col_axis == "mid":
            kept = order.tolist()
            return {name: axes.kept_indices(axis, sizes, "mid", kept) for name, axis in writers.items()}
        inside = axes.within_heads(order, sizes) if axes.mentions(first.col_axis, "dv") else None
        if inside is None:
            return None
        rows = {name: axes.head_indices(axis, sizes, inside) for name, axis in writers.items()}
        return {name: index for name, index in rows.items() if axes.mentions(writers[name], "dv")}

    def gathers(self, plan: Plan) -> tuple[str, ...]:
        """The sites whose order has to be stored, and gathered while the model runs."""
        return tuple(site for site in plan.orders if self.folded_rows(site, plan) is None)

    def order_tensor(self, site: str, count: int) -> tuple[str, TensorSpec]:
        """Name and type of the stored order of a site with so many channels."""
        return f"{self.input_of(site)[0]}.order", TensorSpec("I16" if count <= 2**15 else "I32", (count,))

    def weight_tensors(
        self, weight: Weight, runs: tuple[Run, ...], width: int | None, *, bias: bool, rank: int = 0
    ) -> dict[str, TensorSpec]:
        """The stored tensors of one weight."""
        rows, cols = self.weight_shape(weight, width)
        specs = {f"{weight.name}.bias": TensorSpec("BF16", (rows,))} if bias else {}
        if rank:
            specs[f"{weight.name}.adapter.a"] = TensorSpec("BF16", (rank, cols))
            specs[f"{weight.name}.adapter.b"] = TensorSpec("BF16", (rows, rank))
        if len(runs) == 1 and isinstance(runs[0].precision, BFloat16):
            return {**specs, f"{weight.name}.weight": TensorSpec("BF16", (rows, cols))}
        specs[f"{weight.name}.codes"] = TensorSpec("U8", (rows, code_row_nbytes(runs)))
        specs[f"{weight.name}.scales"] = TensorSpec("F16", (rows, group_count(runs)))
        if zeros := zero_row_nbytes(runs):
            specs[f"{weight.name}.zeros"] = TensorSpec("U8", (rows, zeros))
        return specs

    def unit_tensors(
        self,
        unit: Unit,
        runs: Mapping[str, tuple[Run, ...]],
        width: int | None,
        *,
        biases: tuple[str, ...],
        adapters: Mapping[str, int] = MappingProxyType({}),
        gathers: tuple[str, ...] = (),
    ) -> dict[str, TensorSpec]:
        """The stored tensors of one unit: weights, biases, low-rank pairs, orders, norms and vectors."""
        if unit.dim is not None and width == 0:
            return {}
        specs: dict[str, TensorSpec] = {}
        for name in unit.weights:
            weight = self.weights[name]
            bias, rank = weight.bias or name in biases, adapters.get(name, 0)
            specs |= self.weight_tensors(weight, runs[name], width, bias=bias, rank=rank)
            if weight.site in gathers:
                specs |= dict([self.order_tensor(weight.site, self.weight_shape(weight, width)[1])])
        sizes = self.cut_sizes(unit, width)
        specs |= {name: TensorSpec("BF16", (axes.length(axis, sizes),)) for name, axis in unit.kept}
        return specs

    def tensors(self, plan: Plan) -> dict[str, TensorSpec]:
        """All tensors that a plan writes, in the order of the model."""
        specs = {name: spec for unit in self.units_tensors(plan).values() for name, spec in unit.items()}
        return specs | {name: TensorSpec("BF16", self.shapes[name]) for name in self.fixed}

    def units_tensors(self, plan: Plan) -> dict[str, dict[str, TensorSpec]]:
        """All tensors that a plan writes for each unit."""
        gathers = self.gathers(plan)
        return {
            name: self.unit_tensors(
                unit, plan.weights, self.width(unit, plan), biases=plan.biases, adapters=plan.adapters, gathers=gathers
            )
            for name, unit in self.units.items()
        }

    def tensor_nbytes(self, plan: Plan) -> int:
        """Bytes of all tensors that a plan writes."""
        return sum(spec.nbytes for spec in self.tensors(plan).values())

    def file_nbytes(self, plan: Plan) -> int:
        """Bytes of the weight files that a plan writes, headers included."""
        return sum(shard_nbytes(shard) for shard in shards(self.tensors(plan)))

    def check(self, plan: Plan) -> None:
        """Refuse a plan that does not fit this model.

        Raises:
            PlanError: naming the dim or weight, and the two numbers that disagree.
        """
        for dim, keep in plan.cuts.items():
            unit = self.unit_of_dim(dim)
            if len(set(keep)) != len(keep) or any(not 0 <= i < unit.size for i in keep):
                raise PlanError(f"{dim}: kept indices must be distinct and below {unit.size}")
            if plan.rotation is not None and dim.endswith(".mid") and keep not in {(), tuple(range(unit.size))}:
                raise PlanError(
                    f"{dim}: {len(keep)} of {unit.size} channels are kept, but a rotated plan keeps all or none: its "
                    "rotation mixes them. Cut the dim in a plan without one"
                )
        alive = {w: u for u in self.units.values() if not self.dropped(u, plan) for w in u.weights}
        for name in sorted(alive.keys() ^ plan.weights.keys()):
            why = "has no runs" if name in alive else "does not exist in this model, or its sub-block is dropped"
            raise PlanError(f"weight {name} {why}")
        for name, unit in alive.items():
            cols = self.weight_shape(self.weights[name], self.width(unit, plan))[1]
            count = sum(run.count for run in plan.weights[name])
            if count != cols:
                raise PlanError(f"weight {name}: runs cover {count} input channels, but {cols} are kept")
        for name in plan.biases:
            if name not in alive or alive[name].out_weight != name:
                raise PlanError(
                    f"weight {name} cannot gain a bias: it is not a kept weight that writes to the residual stream"
                )
        for name, rank in plan.adapters.items():
            if name not in alive or alive[name].block is None:
                raise PlanError(f"weight {name} cannot have a low-rank pair: it is not a kept weight of a block")
            most = min(self.weight_shape(self.weights[name], self.width(alive[name], plan)))
            if not 1 <= rank <= most:
                raise PlanError(f"weight {name}: a low-rank pair of rank {rank}, but it can have 1 to {most}")
        for site in sorted({*plan.orders, *plan.acts}):
            self._check_site(site, plan, alive)
        check_kv_cache(plan.kv_cache, self.config)

    def _check_site(self, site: str, plan: Plan, alive: Mapping[str, Unit]) -> None:
        readers = self.readers(site)
        if not readers or readers[0].name not in alive:
            raise PlanError(f"site {site} cannot have an order or rounded inputs: no kept weight of a block reads it")
        cols = sum(run.count for run in plan.weights[readers[0].name])
        if site in plan.orders and sorted(plan.orders[site]) != list(range(cols)):
            raise PlanError(f"site {site}: an order must have each of its {cols} kept channels once")
        counts = [run.count for run in plan.acts.get(site, ())]
        for weight in readers if site in plan.acts else ():
            own = [run.count for run in plan.weights[weight.name]]
            if own != counts:
                raise PlanError(f"site {site}: its inputs are rounded in runs of {counts}, but {weight.name} has {own}")


def header_bound(layout: Layout, rank: int = 0) -> int:
    """An upper bound on the header of any plan without orders: every weight with all its tensors, offsets in full."""
    parts = ("codes", "scales", "zeros", "bias", *(("adapter.a", "adapter.b") if rank else ()))
    names = [f"{w}.{part}" for w in layout.weights for part in parts]
    names += [name for unit in layout.units.values() for name, _ in unit.kept] + list(layout.fixed)
    digits = len(str(2 * layout.parameters + 10**6))
    entry = (
        len('"":{"dtype":"BF16","shape":[,],"data_offsets":[,]},') + 2 * len(str(layout.parameters)) // 2 + 2 * digits
    )
    return 8 + sum(len(name) + entry + 8 for name in names) + 64
