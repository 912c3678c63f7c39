"""A plan as data for `run.json`: what is kept of each unit, in which formats and bytes; the shape of its cache."""

from trimbit.model.layout import Layout
from trimbit.model.sizes import sliding_windows
from trimbit.schema.plan import Plan
from trimbit.schema.run import CacheRecord, UnitRow


def unit_rows(layout: Layout, plan: Plan) -> tuple[UnitRow, ...]:
    """One row a unit: what is kept of it, in which formats, in how many bytes."""
    rows, tensors = [], layout.units_tensors(plan)
    for unit in layout.units.values():
        formats: dict[str, list[str]] = {}
        for name in unit.weights if not layout.dropped(unit, plan) else ():
            runs = plan.weights[name]
            label = "+".join(
                f"{run.count}x{run.precision.name}" if len(runs) > 1 else run.precision.name for run in runs
            )
            formats.setdefault(label, []).append(layout.weights[name].role.removesuffix("_proj"))
        rows.append(
            UnitRow(
                unit=unit.name,
                kept=layout.width(unit, plan) if unit.dim else None,
                size=unit.size if unit.dim else None,
                formats={" ".join(roles): label for label, roles in formats.items()},
                nbytes=sum(spec.nbytes for spec in tensors[unit.name].values()),
            )
        )
    return tuple(rows)


def cache_record(layout: Layout, plan: Plan) -> CacheRecord:
    """The shape of the cache of keys and values."""
    sizes = layout.sizes
    heads = tuple(plan.widths.get(f"blocks.{index}.attn.kv", sizes["kv"]) for index in range(layout.blocks))
    windows = sliding_windows(layout.config)
    return CacheRecord(precision=plan.kv_cache, head_dim=sizes["d"], heads=heads, windows=windows)
