"""Progress on stderr: bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress as bars
import typer

from trimbit.cli.console import stderr
from trimbit.jobs.progress import Progress, Reporter

EVERY_SECONDS, LEAST_SECONDS, PARTS = 30.0, 1.0, 10  # ours: time between two lines of a stage; its parts with a line


def reporter() -> Reporter:
    """Bars if stderr is a terminal that can redraw them, else lines, for a log."""
    return Bars() if sys.stderr.isatty() and stderr.is_interactive else Lines()


class Bars:
    """Progress as bars."""

    def __init__(self) -> None:
        self.open: bars.Progress | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Show a bar for one stage; a nested stage has its bar below."""
        with self._progress() as progress:
            task = progress.add_task(name, total=None)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            yield advance

    @contextmanager
    def _progress(self) -> Iterator[bars.Progress]:
        if self.open is not None:
            yield self.open
            return
        columns = (
            bars.TextColumn("{task.description:<32}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=stderr) as self.open:
            try:
                yield self.open
            finally:
                self.open = None


def _to_stderr(line: str) -> None:
    typer.echo(line, err=True)


class Lines:
    """Progress as lines: when a stage starts, after every 30 seconds or 10 % of it, and when it ends."""

    def __init__(self, write: Callable[[str], None] = _to_stderr, clock: Callable[[], float] = time.monotonic) -> None:
        self.write, self.clock, self.depth = write, clock, 0

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Write the lines of one stage; those of a nested stage are indented."""
        prefix, started, ended = "  " * self.depth + name, self.clock(), "stopped after"
        self.write(f"{prefix}: started")
        self.depth += 1
        try:
            yield _Stage(prefix, self.write, self.clock)
            ended = "done in"
        finally:
            self.depth -= 1
            self.write(f"{prefix}: {ended} {self.clock() - started:.1f} s")


class _Stage:
    """Writes the lines between the first and the last of a stage."""

    def __init__(self, prefix: str, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self.prefix, self.write, self.clock = prefix, write, clock
        self.began = self.told = clock()
        self.told_part = 0
        self.before: int | None = None  # `done` at the time `began`: above 0 in a resumed stage
        self.last = 0

    def __call__(self, done: int, total: int) -> None:
        """Write a line if one is due."""
        now = self.clock()
        if done < self.last:  # the stage counts from the start again
            self.before, self.told_part = None, 0
        if self.before is None:
            self.before, self.began = (0, self.began) if done == 1 and not self.last else (done, now)
        self.last = done
        if total <= 0 or done >= total:  # the last line of the stage says so
            return
        waited, part = now - self.told, PARTS * done // total
        if waited < LEAST_SECONDS or (waited < EVERY_SECONDS and part == self.told_part):
            return
        self.told, self.told_part = now, part
        made = done - self.before
        left = f", about {duration((now - self.began) * (total - done) / made)} left" if made > 0 else ""
        self.write(f"{self.prefix}: {done} of {total} ({100 * done / total:.0f} %){left}")


def duration(seconds: float) -> str:
    """A time in seconds, as text in a unit that is easy to read."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
