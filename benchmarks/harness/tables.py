"""Markdown tables, and the parts of a page that are generated from results."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.origin import origins

Results = dict[str, dict[str, Any]]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, tight: bool = False) -> list[str]:
    """The lines of a Markdown table; `tight` leaves out spaces in the line below the heads."""
    rule = "|" + "---|" * len(heads) if tight else f"| {' | '.join(['---'] * len(heads))} |"
    return [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def between(page: str, name: str, text: str) -> str:
    """The page with the text between `<!-- name -->` and `<!-- end of name -->` replaced.

    Raises:
        ValueError: if a marker is missing.
    """
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, start, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not start or not end:
        raise ValueError(f"the page has no {last if start else first}")
    return f"{before}{start}\n{text}{end}{after}"


def write_parts(path: Path, parts: dict[str, list[str]]) -> None:
    """Write the lines of each part between its markers."""
    page = path.read_text(encoding="utf-8")
    for name, lines in parts.items():
        page = between(page, name, "\n".join(["", *lines, "", ""]))
    path.write_text(page, encoding="utf-8")


def origin_table(results: Results) -> list[str]:
    """A table of the machines and code versions with which cells were measured."""
    return table(["processor", "instruction sets", "threads", "code", "cells"], origins(results))
