"""Writes the tables of docs/results/qpruner.md."""

from harness.bench import DOCS
from harness.tables import Results, origin_table, write_parts
from qpruner import estimators, memory, noise, plans, ranks, recipes, start, tasks

PAGE = DOCS / "results" / "qpruner.md"


def parts(results: Results) -> dict[str, list[str]]:
    """All tables, by the name of their place in the page."""
    return {
        "recipes": recipes.rows(results), "tasks": tasks.rows(results), "memory": memory.rows(results),
        "cost": recipes.cost_rows(results), "plans": plans.rows(results), "noise": noise.rows(results),
        "ranks": ranks.rows(results), "estimators": estimators.rows(results), "starts": start.rows(results),
    }  # fmt: skip


def write(results: Results) -> None:
    """Write the tables into the page."""
    write_parts(PAGE, parts(results) | {"origins": origin_table(results)})
