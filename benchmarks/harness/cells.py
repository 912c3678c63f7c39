"""Cells: each is a figure, or a few measured together; it is stored as soon as it is done, and not run again."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.origin import code_digest, file_digest, machine, package, versions
from trimbit.jobs.cache import save_atomically

Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of an experiment."""

    key: str  # such as `budget/knapsack/45MB`; never renamed once a cell is stored
    run: Callable[[], Found]
    minutes: float  # expected on two cores with AVX2, once what cells share is in the cache
    seed: int = 0
    context: int | None = None  # tokens of a window, where a text is evaluated
    texts: tuple[Path, ...] = ()  # the text files it reads


def seeded(key: str, seed: int) -> str:
    """The key of a cell for a seed; for seed 0 it is `key` itself."""
    return key if seed == 0 else f"{key}/seed {seed}"


class Results:
    """A file of finished cells by key. Several processes may add to it; an interrupted write changes nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code = code_digest(package())  # taken now: later edits do not change what this process runs

    def read(self) -> dict[str, Found]:
        """All finished cells."""
        if not self.path.exists():
            return {}
        found: dict[str, Found] = json.loads(self.path.read_text(encoding="utf-8"))
        return found

    def missing(self, cell: Cell, *, stale: bool = False) -> bool:
        """Whether a cell has to be run; with `stale`, also if it was measured by other code."""
        stored = self.read().get(cell.key)
        return stored is None or (stale and stored.get("code") != self.code)

    def run(self, cell: Cell) -> Found:
        """Run a cell and store it with its origin: time, hardware, versions, code, texts, seed."""
        started = time.perf_counter()
        texts = {path.name: file_digest(path) for path in cell.texts}
        found = cell.run()
        origin = {
            "seconds": round(time.perf_counter() - started, 1), "hardware": machine(), "versions": versions(),
            "code": self.code, "text_digests": texts, "seed": cell.seed, "context": cell.context,
        }  # fmt: skip
        twice = found.keys() & origin.keys()
        assert not twice, f"{cell.key}: {twice} are for the harness to record"
        self.store(cell.key, found | origin)
        return found | origin

    def store(self, key: str, found: Found) -> None:
        """Add a cell to those in the file."""
        with self._locked():
            text = json.dumps(self.read() | {key: found}, indent=1, sort_keys=True) + "\n"
            save_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let only one process at a time write to files in the folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)
