"""Whole jobs on a device that refuses tensors of others, against the CPU."""

import pytest
import torch
from safetensors.torch import load_file

import sessions
from jobs import BUDGET
from pretend import DEVICE, Pretend
from trimbit.errors import RecipeError
from trimbit.schema.budget import Budget

CPU, PRETEND = "cpu", str(DEVICE)


def compressed(job, folder, device, *overrides, **fields):
    opened = sessions.session(job, "compute=float32", *overrides, cache=folder / "cache", device=device, **fields)
    plan = opened.compress(Budget.parse(BUDGET), folder / "out")
    return plan, load_file(folder / "out" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [(), ("criterion.name=activation", "quant.name=rtn"), ("measure.by=measured",)],
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


def test_text_is_sampled_there(job, tmp_path, monkeypatch):
    def sampled(device):
        cache = tmp_path / device
        return sessions.session(job, "compute=float32", calibration="self", cache=cache, device=device).text.fit.tokens

    expected, make = sampled(CPU), torch.tensor

    def there(data, device=None, **more):  # a factory that no mode sees
        return make(data, **more) if device is None else make(data, **more).to(device)

    monkeypatch.setattr(torch, "tensor", there)
    with Pretend():
        found = sampled(PRETEND)
    assert torch.equal(found, expected)


def test_a_device_that_is_not_there(job):
    with pytest.raises(RecipeError, match="device 'cuda:7' is not there: use auto, cpu, cuda or cuda:1"):
        sessions.session(job, device="cuda:7")
    with pytest.raises(RecipeError, match="device 'gpu' is not there"):
        sessions.session(job, device="gpu")
