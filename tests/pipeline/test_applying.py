"""Plans that were applied to be tried."""

import logging

import pytest
from transformers import AutoModelForCausalLM

from jobs import BUDGET
from sessions import compress, entries, session
from trimbit.pipeline import applying
from trimbit.runtime.kv_cache import precision_of
from trimbit.schema.budget import Budget
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import load_plan


def test_a_trial_is_written_as_it_was_tried(job, compressed, tmp_path):
    """The chosen plan was applied to be tried; writing it copies. Applying it again gives the same bytes."""
    _, plan = compressed
    first, second = (session(job, cache=tmp_path / name) for name in ("one", "two"))
    first.write(plan, tmp_path / "first")
    measured = second.oracle.apply_and_measure(plan)
    (folder,) = entries(tmp_path / "two", "applied")
    second.write(plan, tmp_path / "second")
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {path.name for path in (tmp_path / "second").iterdir()}
    for name in names - {"run.json"}:  # which says how long it took
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    weights = (tmp_path / "second" / "model.safetensors").read_bytes()
    assert weights == (folder / "model.safetensors").read_bytes()
    assert measured == second.applied(plan).measured


def test_another_cache_of_keys_and_values_tries_nothing_again(job, compressed, tmp_path, monkeypatch):
    out, plan = compressed
    monkeypatch.setattr(applying, "apply_plan", lambda *_: pytest.fail("applied again"))
    packed = compress(session(job, "kv_cache.bits=8"), Budget.parse(BUDGET), tmp_path / "small")
    assert packed.kv_cache == KVPrecision(bits=8)
    assert packed.found_by.measured_damage == plan.found_by.measured_damage
    assert load_plan(tmp_path / "small" / "plan.json") == packed
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert precision_of(AutoModelForCausalLM.from_pretrained(tmp_path / "small")) == packed.kv_cache


@pytest.mark.parametrize("harm", ["a byte", "the end", "its KL"])
def test_a_damaged_trial_is_made_again(job, compressed, tmp_path, harm, caplog):
    """Not copied out with its old KL."""
    out, plan = compressed
    session(job, cache=tmp_path / "cache").oracle.apply_and_measure(plan)
    (folder,) = entries(tmp_path / "cache", "applied")
    file = folder / ("measured.json" if harm == "its KL" else "model.safetensors")
    data = bytearray(file.read_bytes())
    if harm == "the end":
        del data[-1]
    else:
        data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        written = session(job, cache=tmp_path / "cache").write(plan, tmp_path / "out")
    assert str(folder) in caplog.text
    assert written.found_by.measured_damage == plan.found_by.measured_damage
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
