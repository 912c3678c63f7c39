"""Writes the tables and pictures of docs/benchmarks.md and docs/damage.md."""

from harness.bench import DOCS
from harness.tables import Results, between, origin_table, write_parts
from main import budgets, job, plans, predicted, rounding, spread, texts

PAGE = DOCS / "benchmarks.md"
DAMAGE = DOCS / "damage.md"


def tables(results: Results) -> str:
    """All tables of docs/benchmarks.md, as text."""
    parts = (rounding.rows(results), budgets.rows(results), texts.rows(results), job.rows(results))
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def write(results: Results) -> None:
    """Write both pages and their pictures."""
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), "tables", tables(results)), encoding="utf-8")
    write_parts(PAGE, {"origins": origin_table(results)})
    parts = {"tables": predicted.rows(results), "plans": plans.rows(results), "spread": spread.rows(results)}
    write_parts(DAMAGE, parts)
    predicted.draw(results, DAMAGE.with_suffix(".png"))
    plans.draw(results, DAMAGE.with_name("plans.png"))
    budgets.draw(results, PAGE.with_name("budgets.png"))
