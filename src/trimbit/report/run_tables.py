"""The record of a job, as lines and text tables; reads only `run.json`, without torch."""

from typing import NamedTuple

from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.run import CacheRecord, Run, TriedPlan

SIZES = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
BF16_NBYTES = 2
MOST_TRIED = 12  # ours: rows that fit a screen


class Table(NamedTuple):
    """A table of text; the columns in `left` are aligned to the left."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[str] = frozenset()


def size(nbytes: int) -> str:
    """Bytes in decimal units, such as `72.0 MB`."""
    for unit, name in SIZES:
        if nbytes >= unit:
            return f"{nbytes / unit:,.1f} {name}"
    return f"{nbytes} B"


def headline(parameters: int, nbytes: int, kl: float | None) -> str:
    """The result in a line: size of the original in bf16 and of the weight files, bits, KL to the original."""
    original = BF16_NBYTES * parameters
    damage = "not measured" if kl is None else f"{kl:.3g} nats a token"
    return (
        f"{size(original)} → {size(nbytes)} ({original / nbytes:.1f}x), "
        f"{8 * nbytes / parameters:.2f} bits a parameter, KL {damage}"
    )


def budget_line(nbytes: int, budget_nbytes: int | None) -> str:
    """Bytes of the weight files, and the share of the budget that they take."""
    of = f" of {budget_nbytes:,} ({100 * nbytes / budget_nbytes:.2f} %)" if budget_nbytes else ""
    return f"{nbytes:,} bytes{of}"


def cache_line(record: CacheRecord, context: int) -> str:
    """The cache of keys and values at `context` tokens, batch 1."""
    return f"KV cache@{context}: {cache_text(record.precision, record.nbytes(context), record.bf16_nbytes(context))}"


def cache_text(precision: KVPrecision | None, nbytes: int, bf16: int) -> str:
    """Bytes of a cache, and those of the same model's cache in bf16."""
    if precision is None:
        return f"{nbytes:,} bytes in bf16"
    return f"{nbytes:,} bytes, {bf16:,} in bf16 ({precision.label})"


def units_table(run: Run) -> Table:
    """One row per unit: its kept width, formats and bytes."""
    rows = tuple(
        (
            row.unit,
            "" if row.kept is None else f"{row.kept}/{row.size}",
            "  ".join(f"{roles}: {label}" for roles, label in row.formats.items()) or "dropped",
            f"{row.nbytes:,}",
            f"{100 * row.nbytes / run.nbytes:.1f} %",
        )
        for row in run.units
    )
    return Table("units", ("unit", "kept", "formats", "bytes", "share"), rows, frozenset({"unit", "formats"}))


def tried_table(run: Run) -> Table | None:
    """The plans tried, with the chosen one marked; if there are many, those of lowest KL. None if none were tried."""
    if not run.tried:
        return None
    tried = run.tried
    title = "plans that were tried (KL in nats a token)"
    if len(tried) > MOST_TRIED:
        best = sorted(range(len(tried)), key=lambda at: (tried[at].plan != run.plan, _kl(tried[at])))[:MOST_TRIED]
        title = f"{MOST_TRIED} of {len(tried)} plans that were tried, by KL in nats a token; run.json has all"
        tried = tuple(tried[at] for at in sorted(best))
    columns = {
        "plan": [one.name for one in tried],
        "size": [size(one.nbytes) for one in tried],
        "predicted KL": [_number(one.predicted_kl) for one in tried],
        "estimated KL": [_number(one.estimated_kl) for one in tried],
        "applied KL": [_number(one.applied_kl) for one in tried],
        "accuracy": ["" if one.accuracy is None else f"{100 * one.accuracy:.1f} %" for one in tried],
        "chosen": ["yes" if one.plan == run.plan else "" for one in tried],
    }
    shown = {name: values for name, values in columns.items() if any(values)}
    return Table(title, tuple(shown), tuple(zip(*shown.values(), strict=True)), frozenset({"plan", "chosen"}))


def stages_table(run: Run) -> Table:
    """The stages of the job with their time and memory."""
    rows = [
        (one.stage, f"{one.seconds:,.1f}", size(one.peak_rss_nbytes), "yes" if one.cached else "") for one in run.stages
    ]
    rows.append(("all", f"{sum(one.seconds for one in run.stages):,.1f}", "", ""))
    return Table("stages", ("stage", "seconds", "peak memory", "from cache"), tuple(rows), frozenset({"stage"}))


def _kl(one: TriedPlan) -> float:
    """The most reliable KL of a plan: applied, estimated, predicted, in this order."""
    return next((kl for kl in (one.applied_kl, one.estimated_kl, one.predicted_kl) if kl is not None), float("inf"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
