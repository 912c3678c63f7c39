"""Entries of the cache: whole or not at all, checked, locked, evicted."""

import logging
import os
import subprocess
import sys
import time

import pytest

from trimbit.errors import BudgetError
from trimbit.jobs import cache as caches
from trimbit.jobs.cache import Cache, cache_limit, cache_root, save_atomically


def put(cache, stage="moments", key="k", content="1234"):
    (cache.partial(stage, key) / "value").write_text(content)
    return cache.commit(stage, key)


def reopened(cache):
    """The same cache as another process sees it."""
    return Cache(cache.root, cache.max_nbytes)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path, 10**9)


def test_an_entry_is_there_when_it_was_committed(cache):
    assert cache.open("moments", "k") is None
    path = put(cache)
    assert reopened(cache).open("moments", "k") == path
    assert (path / "value").read_text() == "1234"
    assert not any((cache.root / "partial" / "moments").iterdir())


def test_half_files_of_dead_writers_are_swept(cache):
    (cache.partial("moments", "k") / "block").mkdir()
    (cache.partial("moments", "k") / "block" / "weights.x1.tmp").write_text("half")
    path = put(cache)
    assert [file.name for file in path.rglob("*") if file.is_file()] == ["value", "entry.json"]
    store = cache.store("damage", "k")
    old, new = store / "old.x2.tmp", store / "new.x3.tmp"
    for file, age in ((old, 7200), (new, 60)):  # a minute ago: another process may be writing it
        file.write_text("half")
        os.utime(file, (time.time() - age,) * 2)
    cache.store("damage", "k")
    assert list(store.iterdir()) == [new]


def test_what_an_interrupted_stage_left_is_found_again(cache):
    (cache.partial("moments", "k") / "half").write_text("x")
    again = reopened(cache)
    assert again.open("moments", "k") is None
    assert (again.partial("moments", "k") / "half").read_text() == "x"


@pytest.mark.parametrize("harm", ["changed", "shorter", "missing", "extra", "record", "no record"])
def test_a_damaged_entry_is_named_and_removed(cache, harm, caplog):
    path = put(cache)
    if harm == "changed":
        (path / "value").write_text("1235")
    elif harm == "shorter":
        (path / "value").write_text("123")
    elif harm == "missing":
        (path / "value").unlink()
    elif harm == "extra":
        (path / "other").write_text("")
    elif harm == "record":
        (path / "entry.json").write_text("{")
    else:
        (path / "entry.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert reopened(cache).open("moments", "k") is None
    if harm != "no record":
        assert str(path) in caplog.text
        assert not path.exists()
    assert put(reopened(cache)) == path  # it can be made again


def test_an_entry_that_this_process_has_checked_is_not_read_again(cache, monkeypatch):
    put(cache)
    again = reopened(cache)
    again.open("moments", "k")
    monkeypatch.setattr(caches, "_file_digest", lambda _: pytest.fail("it was read again"))
    assert again.open("moments", "k") is not None


def test_another_process_waits_until_an_entry_is_made(cache, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from trimbit.jobs.cache import Cache\n"
        "cache = Cache(Path(sys.argv[1]))\n"
        "with cache.locked('moments', 'k'):\n"
        "    print('locked', flush=True); time.sleep(0.5)\n"
        "    (cache.partial('moments', 'k') / 'value').write_text('theirs'); cache.commit('moments', 'k')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with cache.locked("moments", "k"):
            assert (cache.open("moments", "k") / "value").read_text() == "theirs"
    assert other.returncode == 0


def test_a_lock_of_a_dead_process_is_none(cache, tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from trimbit.jobs.cache import Cache\n"
        "with Cache(Path(sys.argv[1])).locked('moments', 'k'): os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    with cache.locked("moments", "k"):
        pass


def test_entries_are_listed_with_their_bytes_oldest_first(cache):
    now = time.time()
    for age, key in ((30, "b"), (10, "a"), (20, "c")):
        os.utime(put(cache, key=key, content="x" * age), (now - age, now - age))
    cache.partial("damage", "d")
    (cache.store("candidates", "e") / "w").write_text("12345")
    found = [(e.stage, e.key, e.nbytes, e.complete) for e in cache.entries()]
    assert [key for _, key, _, _ in found][:3] == ["b", "c", "a"]
    assert {("candidates", "e", 5, True), ("damage", "d", 0, False), ("moments", "a", 10, True)} <= set(found)


def test_pruning_removes_what_was_not_used_for_longest_and_nothing_in_use(cache):
    now = time.time()
    for age, key in ((3, "b"), (1, "a"), (2, "c")):
        os.utime(put(cache, key=key, content="x" * 100), (now - age * 86400, now - age * 86400))
    other = reopened(cache)
    assert [entry.key for entry in other.prune(max_nbytes=250)] == ["b"]
    assert [entry.key for entry in other.prune(older_than_days=1.5)] == ["c"]
    other.open("moments", "a")
    assert other.prune(max_nbytes=0) == []  # in use by this process
    assert [entry.key for entry in reopened(cache).clear()] == ["a"]
    assert cache.entries() == []


def test_an_entry_that_another_process_works_on_is_not_pruned(cache, tmp_path):
    put(cache)
    code = (
        "import sys; from pathlib import Path; from trimbit.jobs.cache import Cache\n"
        "with Cache(Path(sys.argv[1])).locked('moments', 'k'): print('locked', flush=True); sys.stdin.readline()\n"
    )
    command, pipe = [sys.executable, "-c", code, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stdin=pipe, text=True) as other:
        other.stdout.readline()
        assert reopened(cache).clear() == []
        other.communicate("\n")
    assert len(reopened(cache).clear()) == 1


def test_the_size_limit_evicts_the_oldest(tmp_path):
    now = time.time()
    for age, key in ((3, "b"), (2, "c")):
        os.utime(put(Cache(tmp_path, 250), key=key, content="x" * 100), (now - age, now - age))
    put(Cache(tmp_path, 250), key="a", content="x" * 100)
    assert sorted(entry.key for entry in Cache(tmp_path).entries()) == ["a", "c"]


def test_root_and_limit_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("TRIMBIT_CACHE_LIMIT", "50MB")
    assert cache_root() == tmp_path / "here"
    assert (Cache().root, Cache().max_nbytes, cache_limit()) == (tmp_path / "here", 50_000_000, 50_000_000)
    monkeypatch.setenv("TRIMBIT_CACHE_LIMIT", "plenty")
    with pytest.raises(BudgetError, match="plenty"):
        cache_limit()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    save_atomically(tmp_path / "a" / "file", lambda path: path.write_text("whole"))
    assert (tmp_path / "a" / "file").read_text() == "whole"

    def fails(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_atomically(tmp_path / "a" / "file", fails)
    assert (tmp_path / "a" / "file").read_text() == "whole"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["file"]
