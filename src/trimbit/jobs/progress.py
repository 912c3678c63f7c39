"""Reporting progress."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

Progress = Callable[[int, int], None]


@runtime_checkable
class Reporter(Protocol):
    """Shows the progress of a job, stage by stage."""

    def stage(self, name: str) -> AbstractContextManager[Progress]:
        """A context for one stage; it gives a callable that takes (done, total)."""


class Silent:
    """Shows nothing."""

    def stage(self, name: str) -> AbstractContextManager[Progress]:
        """Ignore progress."""
        return nullcontext(silent)


def silent(done: int, total: int) -> None:
    """Show nothing."""
