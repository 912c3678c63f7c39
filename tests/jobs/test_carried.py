"""What a sweep carries comes back, and only as often as it was worth to keep."""

import torch

from trimbit.jobs import carried as module
from trimbit.jobs.carried import Carried

LISTS = {"dense": [torch.randn(2, 3), torch.randn(1, 3)], "own": [torch.randn(2, 3)], "none": []}


def test_what_was_kept_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.0)
    carried = Carried(tmp_path)
    assert carried.load() is None
    carried.save(3, LISTS)
    done, lists = Carried(tmp_path).load()
    assert done == 3
    assert lists.keys() == LISTS.keys()
    for name, parts in LISTS.items():
        assert len(lists[name]) == len(parts)
        assert all(torch.equal(a, b) for a, b in zip(lists[name], parts, strict=True))
    carried.finish()
    assert Carried(tmp_path).load() is None


def test_nothing_is_kept_twice_in_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 3600.0)
    carried = Carried(tmp_path)
    carried.save(1, LISTS)
    assert carried.load() is None
