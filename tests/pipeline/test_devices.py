"""Whole jobs on a device that refuses tensors of others, against the CPU."""

import pytest
import torch
from safetensors.torch import load_file

import qpruner_jobs
import sessions
from jobs import BUDGET
from pretend import DEVICE, Pretend
from trimbit.errors import RecipeError
from trimbit.evaluate.perplexity import evaluate
from trimbit.pipeline.estimate.dry_run import estimate
from trimbit.pipeline.recovering import config_of, examples_of, teacher_of
from trimbit.recover.recovery import train_pairs
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
    torch.utils._device._device_constructors()  # keeps the factories of its first call, so these must be the real ones
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
    """Gradients, importance of layers and low-rank pairs."""

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


def test_pairs_are_trained_there(job, tmp_path, factories):
    opened = qpruner_jobs.session(job, "loftq-only", cache=tmp_path / "cache", device=CPU)
    folder = opened.applied(opened.find_plan()).folder
    examples, config = examples_of(opened.job, opened.text), config_of(opened.job)
    taught = teacher_of(opened.job, examples, config)

    def trained(device):
        state = tmp_path / f"{device.type}.safetensors"
        return train_pairs(folder, config, examples, taught, state, 0, lambda *_: None, device)

    expected = trained(torch.device(CPU))
    with Pretend():
        own = trained(DEVICE)
    assert own.losses == pytest.approx(expected.losses, rel=2e-2)
    assert own.losses[-1] < own.losses[0]
    for name, pair in own.pairs.items():
        known = expected.pairs[name].b @ expected.pairs[name].a
        assert (pair.b @ pair.a - known).norm() < 0.25 * known.norm()


@pytest.fixture
def without_inference_mode(monkeypatch):
    """Inference mode turned into `no_grad`: the pretend tensors cannot be made in it."""
    mode = torch.inference_mode
    init = mode.__init__
    monkeypatch.setattr(mode, "__init__", lambda self, mode=True: init(self, mode=False))
    monkeypatch.setattr(mode, "__enter__", lambda self: torch.no_grad().__enter__())
    monkeypatch.setattr(mode, "__exit__", lambda self, *_: torch.set_grad_enabled(True))


def test_a_model_is_evaluated_there(job, tmp_path, factories, without_inference_mode):
    _, _ = compressed(job, tmp_path, CPU)
    ask = {"context": 64, "max_windows": 3, "against": job.model, "dtype": torch.float32}
    expected = evaluate(tmp_path / "out", job.text, device=CPU, **ask)
    with Pretend():
        found = evaluate(tmp_path / "out", job.text, device=PRETEND, **ask)
    for figure in ("ppl", "kl", "top1_agreement"):
        assert getattr(found, figure) == pytest.approx(getattr(expected, figure), rel=1e-4)
    with pytest.raises(RecipeError, match="device 'cuda:7' is not there"):
        evaluate(tmp_path / "out", job.text, device="cuda:7", **ask)


def test_a_device_that_is_not_there(job):
    with pytest.raises(RecipeError, match="device 'cuda:7' is not there: use auto, cpu, cuda or cuda:1"):
        sessions.session(job, device="cuda:7")
    with pytest.raises(RecipeError, match="device 'gpu' is not there"):
        sessions.session(job, device="gpu")
