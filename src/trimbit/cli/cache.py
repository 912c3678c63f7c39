"""The commands for the cache of finished stages: cache show, cache prune, cache clear."""

import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from trimbit.cli.console import print_line, print_table
from trimbit.cli.options import AsJson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimbit.jobs.cache import CacheEntry
    from trimbit.report.run_tables import Table

cache_app = typer.Typer(no_args_is_help=True, help="Show, prune or clear the cache of finished stages.")


@cache_app.command(name="show")
def cache_show(as_json: AsJson = False) -> None:
    """Print what the cache holds, stage by stage."""
    from trimbit.jobs.cache import Cache
    from trimbit.report.run_tables import size

    store = Cache()
    entries = store.entries()
    if as_json:
        rows = [
            {
                "stage": one.stage, "key": one.key, "nbytes": one.nbytes, "used": one.used, "complete": one.complete,
                "path": str(one.path),
            }
            for one in entries
        ]  # fmt: skip
        typer.echo(json.dumps({"root": str(store.root), "max_nbytes": store.max_nbytes, "entries": rows}, indent=1))
        return
    if entries:
        print_table(_by_stage(entries))
    total = sum(one.nbytes for one in entries)
    print_line(f"{store.root}: {_count(entries)}, {size(total)} of at most {size(store.max_nbytes)}")


@cache_app.command(name="prune")
def cache_prune(
    max_size: Annotated[
        str | None, typer.Option("--max-size", help="keep at most this much, such as 20GB, of what was used last")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", help="remove entries not used for this many days", min=0)
    ] = None,
) -> None:
    """Remove the entries that were used longest ago. Entries that a job is working on are kept."""
    from trimbit.errors import DataError
    from trimbit.jobs.cache import Cache
    from trimbit.schema.budget import Budget

    if max_size is None and older_than is None:
        raise DataError("nothing says what to remove; give --max-size, such as 20GB, --older-than DAYS or both")
    nbytes = None
    if max_size is not None:
        size = Budget.parse(max_size)
        if size.unit in {"bpw", "x"}:
            raise DataError(f"--max-size {max_size} is not a number of bytes; give one, such as 20GB")
        nbytes = size.nbytes(0)
    _print_removed(Cache().prune(max_nbytes=nbytes, older_than_days=older_than))


@cache_app.command(name="clear")
def cache_clear() -> None:
    """Remove all entries, except those that a job is working on."""
    from trimbit.jobs.cache import Cache

    _print_removed(Cache().clear())


def _by_stage(entries: "Sequence[CacheEntry]") -> "Table":
    from trimbit.report.run_tables import Table, size

    rows = []
    for stage in sorted({one.stage for one in entries}):
        own = [one for one in entries if one.stage == stage]
        interrupted = sum(not one.complete for one in own)
        used = datetime.fromtimestamp(max(one.used for one in own)).strftime("%Y-%m-%d %H:%M")
        rows.append((stage, f"{len(own)}", f"{interrupted or ''}", size(sum(one.nbytes for one in own)), used))
    columns = ("stage", "entries", "interrupted", "size", "last used")
    return Table("cache", columns, tuple(rows), frozenset({"stage"}))


def _print_removed(removed: "Sequence[CacheEntry]") -> None:
    from trimbit.report.run_tables import size

    print_line(f"removed {_count(removed)}, {size(sum(one.nbytes for one in removed))}")


def _count(entries: "Sequence[CacheEntry]") -> str:
    return f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
