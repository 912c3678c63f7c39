"""A plan as a table: what is kept of each unit, in which formats and bytes."""

from typing import Any

from trimbit.model.kv_nbytes import cache_nbytes
from trimbit.model.layout import Layout
from trimbit.model.sizes import sliding_windows
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import Plan
from trimbit.schema.run import CacheRecord, UnitRow


def cache_fields(layout: Layout, plan: Plan, context: int) -> dict[str, Any]:
    """How keys and values are stored, and their bytes at this many tokens, batch 1; and if all were bf16."""
    nbytes, bf16 = (cache_nbytes(layout.config, plan.widths, kind, context) for kind in (plan.kv_cache, None))
    precision = plan.kv_cache.model_dump(mode="json") if plan.kv_cache else None
    return {"precision": precision, "context": context, "nbytes": nbytes, "bf16_nbytes": bf16}


def cache_line(layout: Layout, plan: Plan, context: int) -> str:
    """The same in a line."""
    fields = cache_fields(layout, plan, context)
    return f"KV cache@{context}: {cache_text(plan.kv_cache, fields['nbytes'], fields['bf16_nbytes'])}"


def cache_text(precision: KVPrecision | None, nbytes: int, bf16: int) -> str:
    """Bytes of a cache, and those of the same model's cache in bf16."""
    if precision is None:
        return f"{nbytes:,} bytes in bf16"
    return f"{nbytes:,} bytes, {bf16:,} in bf16 ({precision.label})"


def plan_rows(layout: Layout, plan: Plan) -> list[dict[str, Any]]:
    """One row a unit: what is kept of it, in which formats, in how many bytes."""
    total = layout.tensor_nbytes(plan)
    rows: list[dict[str, Any]] = []
    tensors = layout.units_tensors(plan)
    for unit in layout.units.values():
        width = layout.width(unit, plan)
        nbytes = sum(spec.nbytes for spec in tensors[unit.name].values())
        formats: dict[str, list[str]] = {}
        for name in unit.weights if not layout.dropped(unit, plan) else ():
            label = "+".join(
                f"{run.count}x{run.precision.name}" if len(plan.weights[name]) > 1 else run.precision.name
                for run in plan.weights[name]
            )
            formats.setdefault(label, []).append(layout.weights[name].role.removesuffix("_proj"))
        rows.append(
            {
                "unit": unit.name,
                "kept": f"{width}/{unit.size}" if unit.dim else "",
                "formats": "  ".join(f"{' '.join(roles)}: {label}" for label, roles in formats.items()) or "dropped",
                "nbytes": nbytes,
                "share": nbytes / total,
            }
        )
    return rows


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
