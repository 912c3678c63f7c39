"""Build the layout of a config from its row in the family table."""

from collections.abc import Mapping
from math import prod

from transformers import PreTrainedConfig

from trimbit.errors import LayoutError
from trimbit.model import axes
from trimbit.model.families import SubBlock, family_of
from trimbit.model.layout import Layout, Unit, Weight
from trimbit.model.parameters import parameter_shapes
from trimbit.model.sizes import sizes_of


def build_layout(config: PreTrainedConfig) -> Layout:
    """Apply the family row to a config, and check that it describes every parameter of the model.

    Raises:
        LayoutError: if the family is unknown, or the row and the model disagree on a parameter or a shape.
    """
    family = family_of(config.model_type)
    shapes = parameter_shapes(config)
    sizes = sizes_of(config)
    tied = bool(config.tie_word_embeddings)
    weights: dict[str, Weight] = {}
    units: dict[str, Unit] = {}
    _add_matrix(family.embed, "embed", "head_in" if tied else "embed", shapes, weights, units)
    for index in range(config.num_hidden_layers):
        for kind, sub in (("attn", family.attn), ("mlp", family.mlp)):
            _add_sub_block(f"{family.blocks}.{index}", index, kind, sub, shapes, sizes, weights, units)
    if not tied:
        _add_matrix(family.head, "head", "head_in", shapes, weights, units)
    fixed = (f"{family.final_norm}.weight",)
    named = {
        *fixed,
        *(f"{w}.weight" for w in weights),
        *(f"{w.name}.bias" for w in weights.values() if w.bias),
    }
    named |= {name for unit in units.values() for name, _ in unit.kept}
    for name in sorted(named ^ shapes.keys()):
        why = "is not described by its family row" if name in shapes else "is in its family row, but not in the model"
        raise LayoutError(f"parameter {name} {why}; correct the row {config.model_type!r} in model/families.py")
    return Layout(
        config=config, family=family, sizes=sizes, weights=weights, units=units, fixed=fixed, tied=tied,
        parameters=sum(prod(shape) for shape in shapes.values()), blocks=config.num_hidden_layers, shapes=shapes,
    )  # fmt: skip


def _add_matrix(
    name: str,
    unit: str,
    site: str,
    shapes: Mapping[str, tuple[int, ...]],
    weights: dict[str, Weight],
    units: dict[str, Unit],
) -> None:
    rows, cols = shapes[f"{name}.weight"]
    weights[name] = Weight(
        name=name,
        unit=unit,
        site=site,
        row_axis="vocab",
        col_axis="hidden",
        rows=rows,
        cols=cols,
        bias=False,
    )
    units[unit] = Unit(name=unit, block=None, weights=(name,))


def _add_sub_block(
    block: str, index: int, kind: str, sub: SubBlock, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int],
    weights: dict[str, Weight], units: dict[str, Unit],
) -> None:  # fmt: skip
    unit = f"blocks.{index}.{kind}"
    names: list[str] = []
    for site, members in sub.sites.items():
        for relative, pattern in members.items():
            name = f"{block}.{relative}"
            row_axis, col_axis = pattern.split(" ")
            rows, cols = axes.length(row_axis, sizes), axes.length(col_axis, sizes)
            if shapes.get(f"{name}.weight") != (rows, cols):
                raise LayoutError(
                    f"weight {name} has shape {shapes.get(f'{name}.weight')}, "
                    f"but the family table expects {(rows, cols)}"
                )
            weights[name] = Weight(
                name=name, unit=unit, site=f"{unit}.{site}", row_axis=row_axis, col_axis=col_axis,
                rows=rows, cols=cols, bias=f"{name}.bias" in shapes,
            )  # fmt: skip
            names.append(name)
    kept = [(f"{block}.{norm}.weight", "hidden") for norm in sub.norms]
    kept += [(f"{block}.{vector}", axis) for vector, axis in sub.vectors.items()]
    units[unit] = Unit(
        name=unit, block=index, weights=tuple(names), dim=f"{unit}.{sub.dim}", size=sizes[sub.dim],
        out_weight=f"{block}.{next(iter(sub.sites[sub.out_site]))}", module=f"{block}.{sub.module}",
        kept=tuple(kept), norms=tuple(f"{block}.{norm}" for norm in sub.norms),
    )  # fmt: skip
