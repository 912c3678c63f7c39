"""A pool of worker processes, each with its share of the threads."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

import torch

from trimbit.errors import TrimbitError

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task], Result]
_open: Callable[[], Work[Any, Any]] | None = None  # in a worker: makes the worker's function
_work: Work[Any, Any] | None = None


class Workers(Generic[Task, Result]):
    """Worker processes that each call `make(*arguments)` once, and apply the function it returns to tasks."""

    def __init__(self, count: int, make: Callable[..., Work[Task, Result]], arguments: Sequence[Any]) -> None:
        threads = max(1, torch.get_num_threads() // count)
        self.pool = ProcessPoolExecutor(
            count, mp_context=get_context("spawn"), initializer=_start, initargs=(threads, partial(make, *arguments))
        )

    def each(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        """The place of each task and its result, as soon as it is known; the error of a task is raised here.

        Raises:
            TrimbitError: if a worker process dies, most likely out of memory.
        """
        try:
            places = {self.pool.submit(_do, task): place for place, task in enumerate(tasks)}
            for future in as_completed(places):
                yield places[future], future.result()
        except BrokenProcessPool as err:
            raise TrimbitError("a worker process died, most likely out of memory; use fewer workers") from err

    def close(self) -> None:
        """End the processes at once, even in the middle of a task."""
        for process in list((self.pool._processes or {}).values()):  # terminate_workers(), from Python 3.14 on
            process.terminate()
        self.pool.shutdown(cancel_futures=True)


def _start(threads: int, make: Callable[[], Work[Any, Any]]) -> None:
    global _open
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main process ends the workers
    torch.set_num_threads(threads)
    _open = make


def _do(task: Any) -> Any:  # noqa: ANN401
    """Do a task. The function is made with the first task: an error in the initializer would hide its reason."""
    global _work
    if _work is None:
        assert _open is not None
        _work = _open()
    return _work(task)
