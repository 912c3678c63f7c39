"""A pool of processes, each with its share of the threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

import torch

from trimbit.errors import TrimbitError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers(Generic[Task, Result]):
    """Processes that run `work`, each after `start(*arguments)`; close them when there is no more to do."""

    def __init__(
        self, count: int, start: Callable[..., None], arguments: Sequence[Any], work: Callable[[Task], Result]
    ) -> None:
        threads = max(1, torch.get_num_threads() // count)
        self.work = work
        self.pool = ProcessPoolExecutor(
            count, mp_context=get_context("spawn"), initializer=_start, initargs=(threads, start, *arguments)
        )

    def map(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """The result of each task, in their order, as soon as it is known.

        Raises:
            TrimbitError: if a process dies; memory is what it lacks as a rule.
        """
        try:
            yield from self.pool.map(self.work, tasks)
        except BrokenProcessPool as err:
            raise TrimbitError("a process has died, for want of memory as a rule: use fewer") from err

    def close(self) -> None:
        """End the processes; what they have not begun is dropped."""
        self.pool.shutdown(cancel_futures=True)


def _start(threads: int, start: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
    torch.set_num_threads(threads)
    start(*arguments)
