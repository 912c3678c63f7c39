"""A plan as data for `run.json`: the kept width, formats and bytes of each unit, and the shape of the KV cache."""

from trimbit.model.layout import Layout
from trimbit.model.resolved import Resolved
from trimbit.model.sizes import sliding_windows
from trimbit.schema.run import CacheRecord, UnitRow


def unit_rows(resolved: Resolved) -> tuple[UnitRow, ...]:
    """One row per unit: its kept width, formats and bytes."""
    rows = []
    for name, unit in resolved.units.items():
        formats: dict[str, list[str]] = {}
        for weight in unit.weights.values():
            runs = weight.runs
            label = "+".join(
                f"{run.count}x{run.precision.name}" if len(runs) > 1 else run.precision.name for run in runs
            )
            formats.setdefault(label, []).append(weight.origin.role.removesuffix("_proj"))
        rows.append(
            UnitRow(
                unit=name,
                kept=unit.width,
                size=unit.origin.size if unit.origin.dim else None,
                formats={" ".join(roles): label for label, roles in formats.items()},
                nbytes=unit.nbytes,
            )
        )
    return tuple(rows)


def cache_record(layout: Layout, resolved: Resolved) -> CacheRecord:
    """The shape of the cache of keys and values."""
    heads = tuple(resolved.units[f"blocks.{index}.attn"].width or 0 for index in range(layout.blocks))
    windows = sliding_windows(layout.config)
    return CacheRecord(precision=resolved.structure.kv_cache, head_dim=layout.sizes["d"], heads=heads, windows=windows)
