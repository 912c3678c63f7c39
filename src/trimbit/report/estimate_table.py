"""The estimates of a dry run, as lines and a text table; without torch."""

from trimbit.report.run_tables import BF16_NBYTES, Table, size
from trimbit.schema.estimate import Estimate

DOES = {  # what a stage does
    "text": "text sampled from the model",
    "moments": "statistics of every layer's inputs",
    "ranking": "which channels and heads go first",
    "importance": "importance of each layer",
    "damage": "damage of each choice",
    "predicted": "damage of each choice, predicted",
    "corrected": "damage of some choices, measured",
    "plan": "search",
    "applied": "pruning, refit, quantisation",
    "teacher": "the original's outputs",
    "pairs": "recovery",
}


def duration(seconds: float | int) -> str:
    """A time in seconds, minutes or hours, with few digits."""
    for most, unit, name in ((100, 1, "s"), (100 * 60, 60, "min")):
        if seconds < most:
            return f"{seconds / unit:.{0 if seconds >= 10 * unit or unit == 1 else 1}f} {name}"
    return f"{seconds / 3600:.1f} h"


def estimate_lines(found: Estimate) -> list[str]:
    """The model, the limit, the text, and one line of time and memory."""
    bits = 8 * found.budget_nbytes / found.parameters
    return [
        f"{found.model}: {found.parameters:,} parameters, {size(BF16_NBYTES * found.parameters)} in bf16",
        f"weight files: at most {found.budget_nbytes:,} bytes ({bits:.2f} bits a parameter)",
        f"text: {found.text}",
        f"about {duration(found.seconds)}, {size(found.peak_rss_nbytes)} of memory",
    ]


def estimate_table(found: Estimate) -> Table:
    """One row per stage, and a last row for all of them."""
    rows = [
        (
            one.stage, DOES.get(one.stage, "") + (f", {one.runs} times" if one.runs > 1 else ""),
            "from cache" if one.cached else duration(one.seconds), "" if one.cached else size(one.peak_rss_nbytes),
        )
        for one in found.stages
    ]  # fmt: skip
    rows.append(("all", "", duration(found.seconds), size(found.peak_rss_nbytes)))
    return Table("what it takes", ("stage", "what it does", "time", "peak memory"), tuple(rows), LEFT)


LEFT = frozenset({"stage", "what it does"})
