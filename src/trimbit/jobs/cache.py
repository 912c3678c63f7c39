"""The cache of finished stages: one folder per entry, named by its content key and checked when opened.

    <root>/<stage>/<key>/        a finished entry, or a store that grows file by file
    <root>/partial/<stage>/<key>/   the partial result of an interrupted stage, which resumes from it
    <root>/locks/<stage>-<key>   held while a process works on the entry; released by the system if it dies

An entry appears complete or not at all: it is made as a partial entry, then renamed. `entry.json` has the digest of
each of its files.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from trimbit.schema.budget import Budget

log = logging.getLogger(__name__)
ENTRY_FILE = "entry.json"
PARTIAL, LOCKS = "partial", "locks"
MAX_NBYTES = 100 * 10**9  # ours
STALE_SECONDS = 3600.0  # ours: writing a file takes less than that


def cache_root() -> Path:
    """`$TRIMBIT_CACHE`, or `~/.cache/trimbit`."""
    return Path(os.environ.get("TRIMBIT_CACHE") or Path.home() / ".cache" / "trimbit")


def cache_limit() -> int:
    """`$TRIMBIT_CACHE_LIMIT`, such as `50GB`, in bytes; 100 GB by default."""
    text = os.environ.get("TRIMBIT_CACHE_LIMIT")
    return Budget.parse(text).nbytes(0) if text else MAX_NBYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """One entry of the cache."""

    stage: str
    key: str
    nbytes: int
    used: float  # time of last use, in seconds since the epoch
    complete: bool  # False: left by an interrupted stage
    path: Path


class Cache:
    """Entries by stage and key under a root folder; above the size limit, the least recently used are evicted."""

    def __init__(self, root: Path | None = None, max_nbytes: int | None = None) -> None:
        self.root = root or cache_root()
        self.max_nbytes = max_nbytes if max_nbytes is not None else cache_limit()
        self._open: set[Path] = set()  # entries that this process uses

    def path(self, stage: str, key: str) -> Path:
        """The folder of a finished entry."""
        return self.root / stage / key

    def partial(self, stage: str, key: str) -> Path:
        """The folder in which an entry is made; files of an interrupted run are kept, except half-written ones."""
        path = self.root / PARTIAL / stage / key
        path.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        return path

    def store(self, stage: str, key: str) -> Path:
        """A folder that grows file by file; its files carry their own digests (`jobs/checked.py`)."""
        path = self.path(stage, key)
        path.mkdir(parents=True, exist_ok=True)
        _sweep(path, older_than=STALE_SECONDS)  # others may be writing
        self._use(path)
        return path

    def open(self, stage: str, key: str) -> Path | None:
        """The folder of a finished, intact entry; None if there is none.

        An entry with changed or damaged files is reported and removed.
        """
        path = self.path(stage, key)
        if not (path / ENTRY_FILE).is_file():
            return None
        if path not in self._open and (problem := _damage(path)):
            log.warning("%s: %s; removing and recomputing the entry", path, problem)
            shutil.rmtree(path)
            return None
        self._use(path)
        return path

    def commit(self, stage: str, key: str) -> Path:
        """Turn the partial entry into a finished one, then evict entries above the size limit."""
        partial, path = self.partial(stage, key), self.path(stage, key)
        files = {str(file.relative_to(partial)): _file_digest(file) for file in _files(partial)}
        fields = {"stage": stage, "key": key, "files": files}
        (partial / ENTRY_FILE).write_text(json.dumps(fields, indent=1), encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # a folder without entry.json
            shutil.rmtree(path)
        partial.rename(path)
        self._use(path)
        self._evict()
        return path

    def remove(self, stage: str, key: str) -> None:
        """Remove an entry, finished or not."""
        for path in (self.path(stage, key), self.root / PARTIAL / stage / key):
            shutil.rmtree(path, ignore_errors=True)
            self._open.discard(path)

    @contextmanager
    def locked(self, stage: str, key: str) -> Iterator[None]:
        """Lock an entry, so that only one process makes it; waits while another process holds the lock."""
        path = self.root / LOCKS / f"{stage}-{key}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("waiting for another process that is making %s %s", stage, key)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def entries(self) -> list[CacheEntry]:
        """All entries, the least recently used first."""
        found = []
        for complete, root in ((True, self.root), (False, self.root / PARTIAL)):
            for path in root.glob("*/*"):
                stage = path.parent.name
                if path.is_dir() and stage not in {PARTIAL, LOCKS}:
                    nbytes = sum(file.stat().st_size for file in _files(path))
                    found.append(
                        CacheEntry(
                            stage=stage, key=path.name, nbytes=nbytes, used=path.stat().st_mtime,
                            complete=complete, path=path,
                        )
                    )  # fmt: skip
        return sorted(found, key=lambda entry: entry.used)

    def prune(self, max_nbytes: int | None = None, older_than_days: float | None = None) -> list[CacheEntry]:
        """Remove entries not used for `older_than_days`, and the least recently used above `max_nbytes` bytes in total.

        Entries in use are kept. Returns the removed entries.
        """
        entries = [entry for entry in self.entries() if entry.path not in self._open and self._free(entry)]
        total = sum(entry.nbytes for entry in self.entries())
        removed = []
        for entry in entries:
            old = older_than_days is not None and time.time() - entry.used > older_than_days * 86400
            if old or (max_nbytes is not None and total > max_nbytes):
                shutil.rmtree(entry.path, ignore_errors=True)
                total -= entry.nbytes
                removed.append(entry)
        return removed

    def clear(self) -> list[CacheEntry]:
        """Remove all entries that are not in use; returns them."""
        return self.prune(max_nbytes=-1)

    def _evict(self) -> None:
        for entry in self.prune(max_nbytes=self.max_nbytes):
            log.info("the cache is over its limit of %d bytes: removed %s", self.max_nbytes, entry.path)

    def _use(self, path: Path) -> None:
        self._open.add(path)
        os.utime(path)

    def _free(self, entry: CacheEntry) -> bool:
        """Whether no process holds the lock of an entry."""
        lock = self.root / LOCKS / f"{entry.stage}-{entry.key}"
        if not lock.exists():
            return True
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True


def save_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears complete or not at all; a failed write leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(folder: Path, older_than: float = 0.0) -> None:
    """Remove half-written files of processes that died."""
    for file in folder.rglob("*.tmp"):
        with suppress(FileNotFoundError):  # another process has just finished it
            if time.time() - file.stat().st_mtime >= older_than:
                file.unlink()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ENTRY_FILE)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _damage(path: Path) -> str | None:
    """How an entry differs from the files that were written; None: it does not."""
    try:
        want = dict(json.loads((path / ENTRY_FILE).read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        return f"{ENTRY_FILE} is damaged"
    have = {str(file.relative_to(path)) for file in _files(path)}
    if odd := sorted(have ^ want.keys()):
        return f"{odd[0]} is {'missing' if odd[0] in want else 'not part of the entry'}"
    return next((f"{name} was damaged" for name, own in want.items() if _file_digest(path / name) != own), None)
