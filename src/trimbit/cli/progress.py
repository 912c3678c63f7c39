"""Progress on stderr."""

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trimbit.cli.options import stderr

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Bars:
    """Progress as bars on stderr."""

    def __init__(self) -> None:
        self.open: Progress | None = None

    @contextmanager
    def stage(self, name: str) -> "Iterator[Callable[[int, int], None]]":
        """A bar for one stage; a stage inside another one has its bar below."""
        with self._progress() as progress:
            task = progress.add_task(name, total=None)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            yield advance

    @contextmanager
    def _progress(self) -> "Iterator[Progress]":
        if self.open is not None:
            yield self.open
            return
        columns = (
            TextColumn("{task.description:<32}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=stderr) as self.open:
            try:
                yield self.open
            finally:
                self.open = None
