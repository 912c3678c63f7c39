"""Plans that were applied to be tried."""

import shutil

import pytest
from transformers import AutoModelForCausalLM

from jobs import BUDGET
from sessions import compress, session
from trimbit.errors import ArtifactError
from trimbit.runtime.kv_cache import precision_of
from trimbit.schema.budget import Budget
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import load_plan
from trimbit.trial import applied as trials


def test_a_trial_is_written_as_it_was_tried(job, compressed, tmp_path):
    """The chosen plan was applied to be tried; writing it copies. Applying it again gives the same bytes."""
    _, plan = compressed
    opened = session(job, cache=tmp_path / "cache")
    opened.write(plan, tmp_path / "first")
    assert not (tmp_path / "cache" / "trials").exists()
    assert opened.judging.trial(plan) == plan.found_by.measured_damage
    (folder,) = (tmp_path / "cache" / "trials").iterdir()
    opened.write(plan, tmp_path / "second")
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_another_cache_of_keys_and_values_tries_nothing_again(job, compressed, tmp_path, monkeypatch):
    out, plan = compressed
    monkeypatch.setattr(trials, "apply_plan", lambda *_: pytest.fail("applied again"))
    packed = compress(session(job, "kv_cache.bits=8"), Budget.parse(BUDGET), tmp_path / "small")
    assert packed.kv_cache == KVPrecision(bits=8)
    assert packed.found_by.measured_damage == plan.found_by.measured_damage
    assert load_plan(tmp_path / "small" / "plan.json") == packed
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert precision_of(AutoModelForCausalLM.from_pretrained(tmp_path / "small")) == packed.kv_cache


def test_a_damaged_trial_is_not_copied(job, compressed, tmp_path):
    _, plan = compressed
    opened = session(job, cache=tmp_path / "cache")
    opened.judging.trial(plan)
    (weights,) = (tmp_path / "cache" / "trials").glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"trials/.* is damaged; remove it"):
        opened.write(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_runs_that_try_the_same_plan(job, compressed, tmp_path, monkeypatch):
    _, plan = compressed
    first, second = (session(job, cache=tmp_path / name) for name in ("first", "second"))
    first.judging.trial(plan)
    apply = trials.apply_plan

    def meanwhile(*arguments):
        found = apply(*arguments)
        shutil.copytree(tmp_path / "first" / "trials", tmp_path / "second" / "trials", dirs_exist_ok=True)
        return found

    monkeypatch.setattr(trials, "apply_plan", meanwhile)
    assert second.judging.trial(plan) == plan.found_by.measured_damage
    assert len(list((tmp_path / "second" / "trials").iterdir())) == 1
