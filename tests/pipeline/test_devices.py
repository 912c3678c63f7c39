"""Whole jobs on a device that refuses tensors of others, against the CPU."""

import pytest
import torch
from safetensors.torch import load_file

import qpruner_jobs
import sessions
from jobs import BUDGET
from pretend import DEVICE, Pretend
from trimbit.errors import RecipeError
from trimbit.pipeline.estimate.dry_run import estimate
from trimbit.schema.budget import Budget

CPU, PRETEND = "cpu", str(DEVICE)
GPTQ = "quant.scales=absmax"  # the search for scales is thousands of operations, each slow there


def compressed(job, folder, device, *overrides, **fields):
    opened = sessions.session(job, "compute=float32", *overrides, cache=folder / "cache", device=device, **fields)
    plan = opened.compress(Budget.parse(BUDGET), folder / "out")
    return plan, load_file(folder / "out" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [(GPTQ,), ("criterion.name=activation", "quant.name=rtn"), (GPTQ, "measure.by=measured")],
    ids=["default", "rtn", "measured"],
)
def test_the_same_model_is_made(job, tmp_path, overrides):
    expected, tensors = compressed(job, tmp_path / "cpu", CPU, *overrides)
    with Pretend():
        plan, own = compressed(job, tmp_path / "device", PRETEND, *overrides)
    assert plan.content == expected.content
    assert plan.found_by.measured_damage == pytest.approx(expected.found_by.measured_damage, rel=1e-3)
    assert own.keys() == tensors.keys()
    same = [torch.equal(own[name], tensors[name]) for name in own]
    assert sum(same) > 0.9 * len(same)


@pytest.fixture
def factories(monkeypatch):
    """`torch.tensor` makes its result where it is asked to: no mode sees that factory."""
    make = torch.tensor

    def there(data, device=None, **more):
        return make(data, **more) if device is None else make(data, **more).to(device)

    monkeypatch.setattr(torch, "tensor", there)


def test_text_is_sampled_there(job, tmp_path, factories):
    def sampled(device):
        cache = tmp_path / device
        return sessions.session(job, "compute=float32", calibration="self", cache=cache, device=device).text.fit.tokens

    expected = sampled(CPU)
    with Pretend():
        found = sampled(PRETEND)
    assert torch.equal(found, expected)


def test_a_dry_run_times_its_pieces_there(job, tmp_path, factories):
    with Pretend():
        opened = sessions.session(
            job, "compute=float32", calibration="self", cache=tmp_path / "cache", device=PRETEND
        ).job
        told = estimate(opened, Budget.parse(BUDGET))
    assert {"text", "moments", "ranking", "predicted", "corrected", "applied"} <= {one.stage for one in told.stages}
    assert all(one.seconds > 0 for one in told.stages)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [("loftq-only", ()), ("qpruner-1", ("lowrank.init=zeros",)), ("qpruner-2", ())],
)
def test_pairs_and_importance(job, tmp_path, name, overrides, factories):
    """Gradients, importance of layers and low-rank pairs; training is on the CPU."""

    def made(device):
        overridden = ("compute=float32", "tune=null", *overrides)
        opened = qpruner_jobs.session(job, name, *overridden, cache=tmp_path / device / "cache", device=device)
        plan = opened.compress(None, tmp_path / device / "out")
        return plan, load_file(tmp_path / device / "out" / "model.safetensors")

    expected, tensors = made(CPU)
    with Pretend():
        plan, own = made(PRETEND)
    assert plan.content == expected.content
    assert plan.adapters
    names = [key.removesuffix(".a") for key in tensors if key.endswith(".adapter.a")]
    assert len(names) == len(plan.adapters)
    for name in names:
        product, known = ((each[f"{name}.b"].float() @ each[f"{name}.a"].float()) for each in (own, tensors))
        torch.testing.assert_close(product, known, rtol=2e-2, atol=2e-3)
    assert own.keys() == tensors.keys()


def test_a_device_that_is_not_there(job):
    with pytest.raises(RecipeError, match="device 'cuda:7' is not there: use auto, cpu, cuda or cuda:1"):
        sessions.session(job, device="cuda:7")
    with pytest.raises(RecipeError, match="device 'gpu' is not there"):
        sessions.session(job, device="gpu")
