"""Where progress goes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

Progress = Callable[[int, int], None]


@runtime_checkable
class Reporter(Protocol):
    """Shows the stages of a job."""

    def stage(self, name: str) -> AbstractContextManager[Progress]:
        """A stage of work; the callable takes (done, total)."""


class Silent:
    """Shows nothing."""

    def stage(self, name: str) -> AbstractContextManager[Progress]:
        """Ignore progress."""
        return nullcontext(silent)


def silent(done: int, total: int) -> None:
    """Show nothing."""
