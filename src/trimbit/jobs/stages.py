"""Stages as data, and the runner that caches, resumes, times and reports them."""

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
    """Everything that the result of a stage depends on, besides the libraries.

    `version` is raised whenever a change of the code changes results.
    """

    stage: ClassVar[str]
    version: ClassVar[int]

    @property
    def digest(self) -> str:
        """The content key, of stage, version, libraries and all fields."""
        return digest([self.stage, self.version, libraries(), self.model_dump(mode="json")])


@cache
def libraries() -> tuple[str, ...]:
    """The libraries whose versions may change results, with these versions."""
    return tuple(f"{name} {version(name)}" for name in ("torch", "transformers"))


@dataclass(frozen=True, slots=True)
class Work:
    """The context of a stage at work: a folder that survives interruptions, and a callable for its progress."""

    folder: Path
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[T]):
    """One stage: its key, and how to make its result in a folder and load it from there.

    If the folder has files of an interrupted run, `make` resumes from them.
    """

    key: StageKey
    title: str  # shown with its progress
    make: Callable[[Work], None]
    load: Callable[[Path], T]


@dataclass(slots=True)
class _Took:
    """Time and peak memory of a stage."""

    seconds: float = 0.0
    nbytes: int = 0


@dataclass
class Runner:
    """Runs stages: each result is made once and cached, on disk and in this process."""

    cache: Cache = field(default_factory=Cache)
    reporter: Reporter = field(default_factory=Silent)

    def __post_init__(self) -> None:
        self.records: dict[str, StageRecord] = {}  # by key, in the order they finished
        self._results: dict[str, Any] = {}
        self._inside: list[float] = []  # for each running stage, the seconds of the stages inside it

    def run(self, stage: Stage[T]) -> T:
        """The result of a stage: from memory, from the cache, or made now."""
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
        """Measure a stage; stages inside it have their own records, and count only in its memory."""
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
        """Work on a store, a result that grows file by file; each file carries its digest."""
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
        """Whether the result is in the cache."""
        return self.cache.open(stage.key.stage, stage.key.digest) is not None

    def forget(self, stage: Stage[T]) -> None:
        """Remove the result of a stage, finished or partial."""
        key = stage.key.digest
        self._results.pop(key, None)
        self.cache.remove(stage.key.stage, key)
