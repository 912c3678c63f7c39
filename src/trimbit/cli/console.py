"""How the commands print."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import rich.table
from rich.console import Console

if TYPE_CHECKING:
    from trimbit.report.run_tables import Table

stdout, stderr = Console(), Console(stderr=True)


def print_line(text: str) -> None:
    """Print a line of a result, never wrapped, as other programs may read it."""
    stdout.print(text, highlight=False, markup=False, soft_wrap=True)


def print_pairs(pairs: Iterable[tuple[str, str]], title: str | None = None) -> None:
    """Print names and values, one pair per row."""
    table = rich.table.Table(show_header=False, title=title)
    for pair in pairs:
        table.add_row(*pair)
    stdout.print(table)


def print_table(table: "Table") -> None:
    """Print a table with column headers."""
    shown = rich.table.Table(title=table.title)
    for column in table.columns:
        shown.add_column(column, justify="left" if column in table.left else "right")
    for row in table.rows:
        shown.add_row(*row)
    stdout.print(shown)
