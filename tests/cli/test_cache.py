"""`cache show`, `prune` and `clear` on a real cache of small entries."""

import json
import os
import time

import pytest

from trimbit.jobs.cache import Cache

DAY = 86400


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cache with two finished entries of 1000 and 3000 bytes, 10 and 2 days old, and an interrupted one of 500."""
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path / "cache"))
    store = Cache()
    for key, nbytes, days in (("old", 1000, 10), ("new", 3000, 2)):
        (store.partial("stats", key) / "moments").write_bytes(bytes(nbytes))
        os.utime(store.commit("stats", key), (time.time() - days * DAY,) * 2)
    partial = store.partial("search", "half")
    (partial / "journal").write_bytes(bytes(500))
    os.utime(partial, (time.time() - DAY,) * 2)
    return tmp_path / "cache"


def keys():
    return {entry.key for entry in Cache().entries()}


def test_show(run, root, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run("cache", "show")
    assert code == 0, err
    assert f"{root}: 3 entries, 4.5 kB of at most 100.0 GB" in out
    rows = {line.split()[1]: line.split() for line in out.splitlines() if "kB" in line and "│" in line}
    assert rows["stats"][3] == "2"
    assert "4.0 kB" in " ".join(rows["stats"])
    search = next(line for line in out.splitlines() if "search" in line)
    assert search.split()[1:7] == ["search", "│", "1", "│", "1", "│"]


def test_json(run, root):
    code, out, err = run("cache", "show", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["root"], found["max_nbytes"]) == (str(root), 10**11)
    assert [(one["stage"], one["key"], one["nbytes"], one["complete"]) for one in found["entries"]] == [
        ("stats", "old", 1000, True), ("stats", "new", 3000, True), ("search", "half", 500, False),
    ]  # fmt: skip
    assert found["entries"][0].keys() == {"stage", "key", "nbytes", "used", "complete", "path"}


@pytest.mark.usefixtures("root")
def test_prune_by_age(run):
    code, out, err = run("cache", "prune", "--older-than", 5)
    assert (code, out) == (0, "removed 1 entry, 1.0 kB\n"), err
    assert keys() == {"new", "half"}


@pytest.mark.usefixtures("root")
def test_prune_by_size_removes_what_was_used_longest_ago(run):
    code, out, err = run("cache", "prune", "--max-size", "600B")
    assert (code, out) == (0, "removed 2 entries, 4.0 kB\n"), err
    assert keys() == {"half"}


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--max-size", "--older-than"]),
        (["--max-size", "0.5x"], ["--max-size 0.5x", "20GB"]),  # of no model: zero bytes
        (["--max-size", "3bpw"], ["--max-size 3bpw"]),
        (["--max-size", "much"], ["'much'"]),
    ],
)
def test_prune_refuses_what_it_cannot_go_by(refused, options, words):
    refused("cache", "prune", *options, words=words)
    assert keys() == {"old", "new", "half"}


@pytest.mark.usefixtures("root")
def test_clear_leaves_what_a_job_works_on(run):
    with Cache().locked("stats", "new"):
        code, out, err = run("cache", "clear")
    assert (code, out) == (0, "removed 2 entries, 1.5 kB\n"), err
    assert keys() == {"new"}


def test_an_empty_cache(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path / "none"))
    code, out, _ = run("cache", "show")
    assert code == 0
    assert "0 entries, 0 B" in out
    assert run("cache", "clear")[1] == "removed 0 entries, 0 B\n"
    assert not (tmp_path / "none").exists()
