"""A family row applied to a config: dims, sizes, weights and units, always of the *original* model.

`resolved.py` applies a plan to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from trimbit.errors import PlanError
from trimbit.model import axes
from trimbit.model.families import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A matrix that can be quantised, `rows x cols`: output channels by input channels."""

    name: str  # module path, such as model.layers.0.mlp.down_proj
    unit: str  # blocks.0.mlp
    site: str  # the input that it reads, such as blocks.0.mlp.mid; weights of one site read the same input
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
    """A sub-block, the embedding or the head; the search makes one choice for each unit."""

    name: str  # blocks.7.attn
    block: int | None
    weights: tuple[str, ...]
    dim: str | None = None  # blocks.7.attn.kv
    size: int = 0  # of the dim
    out_weight: str | None = None  # writes to the residual stream
    module: str | None = None
    kept: tuple[tuple[str, str], ...] = ()  # (parameter, axis) of norms and vectors: bf16, dropped with the unit
    norms: tuple[str, ...] = ()

    @property
    def factor(self) -> str:
        """The dim's name in axes, such as `kv`; empty if the unit has no dim."""
        return (self.dim or "").rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The structure of a model: everything that the rest of the code knows about it."""

    config: PreTrainedConfig
    family: Family
    sizes: Mapping[str, int]
    weights: Mapping[str, Weight]
    units: Mapping[str, Unit]
    fixed: tuple[str, ...]  # parameters that no plan changes, such as the final norm
    tied: bool
    parameters: int  # number of parameters of the original; tied ones count once
    blocks: int
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)  # of every original parameter

    def unit_of_dim(self, dim: str) -> Unit:
        """The unit that a dim belongs to.

        Raises:
            PlanError: if no unit has this dim.
        """
        unit = self.units.get(dim.rsplit(".", 1)[0])
        if unit is None or unit.dim != dim:
            raise PlanError(
                f"this model has no dim {dim!r}; "
                f"its dims are blocks.N.attn.kv and blocks.N.mlp.mid for N below {self.blocks}"
            )
        return unit

    def weight_shape(self, weight: Weight, width: int | None) -> tuple[int, int]:
        """Rows and columns of a weight if its unit keeps `width` of its dim (None: all)."""
        unit = self.units[weight.unit]
        sizes = self.cut_sizes(unit, width)
        return axes.length(weight.row_axis, sizes), axes.length(weight.col_axis, sizes)

    def cut_sizes(self, unit: Unit, width: int | None) -> dict[str, int]:
        """Sizes of all factors if the unit keeps `width` of its dim (None: all)."""
        if unit.dim is None or width is None:
            return dict(self.sizes)
        return {**self.sizes, unit.factor: width}

    def readers(self, site: str) -> tuple[Weight, ...]:
        """The weights that read a site of a block; empty for any other site."""
        unit = self.units.get(site.rsplit(".", 1)[0])
        names = () if unit is None or unit.block is None else unit.weights
        return tuple(self.weights[name] for name in names if self.weights[name].site == site)

    def input_of(self, site: str) -> tuple[str, bool]:
        """The module whose output (True: a norm) or input (False: a weight) is a site's input."""
        first = self.readers(site)[0]
        unit = self.units[first.unit]
        at_start = self.weights[unit.weights[0]].site == site
        return (unit.norms[0], True) if at_start else (first.name, False)


def header_bound(layout: Layout, rank: int = 0) -> int:
    """An upper bound in bytes on the header of any plan without orders, with all tensors that a weight can have."""
    parts = ("codes", "scales", "zeros", "bias", *(("adapter.a", "adapter.b") if rank else ()))
    names = [f"{w}.{part}" for w in layout.weights for part in parts]
    names += [name for unit in layout.units.values() for name, _ in unit.kept] + list(layout.fixed)
    digits = len(str(2 * layout.parameters + 10**6))
    entry = (
        len('"":{"dtype":"BF16","shape":[,],"data_offsets":[,]},') + 2 * len(str(layout.parameters)) // 2 + 2 * digits
    )
    return 8 + sum(len(name) + entry + 8 for name in names) + 64
