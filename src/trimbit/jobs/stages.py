"""Stages as values, and the runner that caches, resumes, times and reports them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from trimbit.jobs.cache import Cache
from trimbit.jobs.hardware import PeakMemory
from trimbit.jobs.progress import Progress, Reporter, Silent
from trimbit.schema.base import Schema, digest
from trimbit.schema.run import StageRecord

T = TypeVar("T")


class StageKey(Schema):
    """Everything that the result of a stage depends on, beside the libraries.

    `version` is raised whenever a change of the code changes results.
    """

    stage: ClassVar[str]
    version: ClassVar[int]

    @property
    def digest(self) -> str:
        """The content key: stage, version, libraries and all fields."""
        return digest([self.stage, self.version, libraries(), self.model_dump(mode="json")])


@cache
def libraries() -> tuple[str, ...]:
    """The libraries whose version may change results."""
    return tuple(f"{name} {version(name)}" for name in ("torch", "transformers"))


@dataclass(frozen=True, slots=True)
class Work:
    """Where a stage works: a folder that outlives interruptions, and where its progress goes."""

    folder: Path
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[T]):
    """One stage: its key, how its result is made in a folder, and how it is read from there.

    `make` may find in its folder what an interrupted run has left, and goes on from there.
    """

    key: StageKey
    title: str  # that progress shows
    make: Callable[[Work], None]
    load: Callable[[Path], T]


@dataclass(slots=True)
class _Took:
    """What a stage took."""

    seconds: float = 0.0
    nbytes: int = 0


@dataclass
class Runner:
    """Runs stages: each result is made once, kept in the cache, and remembered while the process lives."""

    cache: Cache = field(default_factory=Cache)
    reporter: Reporter = field(default_factory=Silent)

    def __post_init__(self) -> None:
        self.records: dict[str, StageRecord] = {}  # by key, in the order in which they finished
        self._results: dict[str, Any] = {}
        self._inside: list[float] = []  # of each stage that runs, the seconds of those inside it

    def run(self, stage: Stage[T]) -> T:
        """The result of a stage, from memory, from the cache, or made now."""
        key = stage.key.digest
        if key not in self._results:
            self._results[key] = self._run(stage, key)
        result: T = self._results[key]
        return result

    def _run(self, stage: Stage[T], key: str) -> T:
        name = stage.key.stage
        with self._measured() as took, self.cache.locked(name, key):
            folder = self.cache.open(name, key)
            cached = folder is not None
            if folder is None:
                with self.reporter.stage(stage.title) as progress:
                    stage.make(Work(self.cache.partial(name, key), progress))
                folder = self.cache.commit(name, key)
            result = stage.load(folder)
        self.records[key] = StageRecord(
            stage=name, key=key, cached=cached, seconds=round(took.seconds, 3), peak_rss_nbytes=took.nbytes
        )
        return result

    @contextmanager
    def _measured(self) -> Iterator["_Took"]:
        """What a stage takes; the stages inside it, which have records of their own, count in its memory alone."""
        took, started = _Took(), time.perf_counter()
        self._inside.append(0.0)
        try:
            with PeakMemory() as peak:
                yield took
        finally:
            whole = time.perf_counter() - started
            took.seconds, took.nbytes = whole - self._inside.pop(), peak.nbytes
            if self._inside:
                self._inside[-1] += whole

    @contextmanager
    def store(self, key: StageKey, title: str) -> Iterator[Work]:
        """Work on a store, a result that grows file by file; its files carry their own digests."""
        name, digest_ = key.stage, key.digest
        with self._measured() as took, self.cache.locked(name, digest_), self.reporter.stage(title) as progress:
            yield Work(self.cache.store(name, digest_), progress)
        before = self.records.get(digest_)
        self.records[digest_] = StageRecord(
            stage=name, key=digest_, cached=False,
            seconds=round(took.seconds + (before.seconds if before else 0.0), 3),
            peak_rss_nbytes=max(took.nbytes, before.peak_rss_nbytes if before else 0),
        )  # fmt: skip

    def has(self, stage: Stage[T]) -> bool:
        """Whether the result is there already."""
        return self.cache.open(stage.key.stage, stage.key.digest) is not None

    def forget(self, stage: Stage[T]) -> None:
        """Remove the result of a stage, and what an interrupted run has left of it."""
        key = stage.key.digest
        self._results.pop(key, None)
        self.cache.remove(stage.key.stage, key)
