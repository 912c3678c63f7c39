"""Training of low-rank pairs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qpruner_jobs import session
from sessions import compress
from tiny import VOCAB
from trimbit.errors import NumericsError
from trimbit.pipeline.recovering import examples_of
from trimbit.recover.recovery import _taken_out
from trimbit.recover.tune import Config, _drawn, drawn, tune
from trimbit.runtime.layers import AdaptedLinear, PackedLinear
from trimbit.runtime.load import load_model

TOKENS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def test_every_row_is_seen_once_an_epoch():
    seen = [at for step in range(12) for at in _drawn(step, 5, 12, seed=3)]
    epochs = [seen[at : at + 12] for at in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.slow
def test_checkpointing_changes_memory_alone(job, tmp_path):
    """The same losses, from fewer tensors kept between forward and backward."""
    losses, kept = [], []
    for name, overrides in {"plain": (), "again": ("tune.checkpointing=true",)}.items():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            compress(session(job, "qpruner-1", *overrides, cache=tmp_path / f"{name} cache"), None, tmp_path / name)
        losses.append(json.loads((tmp_path / name / "tuning.json").read_text())["losses"])
        kept.append(sum(sizes))
    assert losses[0] == losses[1]
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("step", [1, 2, 3])  # of four; after the second and the last one the state is stored
def test_what_is_not_finite_stops_with_the_last_good_state(job, tmp_path, monkeypatch, what, step):
    from trimbit.recover import tune

    real = tune._step

    def broken(model, *rest):
        """At one step the loss, or one element of a gradient, is not finite; the other one is."""
        loss = real(model, *rest)
        if rest[-1] == step and what == "gradient":
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = float("nan")
        return float("nan") if rest[-1] == step and what == "loss" else loss

    monkeypatch.setattr(tune, "_step", broken)
    kept = "no state was kept yet" if step < 2 else "the state after step 2 is kept"
    with pytest.raises(NumericsError, match=f"a {what} of step {step + 1} of recovery is not finite; {kept}"):
        compress(session(job, "qpruner-1", cache=tmp_path), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    states = list((tmp_path / "partial" / "pairs").glob("*/state.safetensors"))
    assert len(states) == (step >= 2)
    assert all(bool(tensor.isfinite().all()) for state in states for tensor in load_file(state).values())


def test_a_recovery_that_breaks_the_model_at_its_last_step_writes_nothing(job, tmp_path):
    broken = ("tune.learning_rate=1e30", "tune.steps=1", "tune.warmup=0.0")
    with pytest.raises(NumericsError, match="not finite"):
        compress(session(job, "qpruner-1", *broken, cache=tmp_path), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_training_draws_is_known_before():
    config = Config(steps=3, batch=4)
    assert drawn(config, 100, 0) == sorted(at for step in range(3) for at in _drawn(step, 4, 100, 0))
    assert drawn(config, 5, 0) == [0, 1, 2, 3, 4]


def test_the_written_pairs_are_those_that_were_trained(job, tmp_path):
    """PEFT's model, with its scale of alpha / rank = 8, and the directory give the same logits."""
    opened = session(job, "qpruner-1", cache=tmp_path)
    plan = opened.find_plan(None)
    folder, examples = opened.applied(plan).folder, examples_of(opened.job, opened.text)
    model = load_model(folder, torch.bfloat16)
    kinds, before = (PackedLinear, AdaptedLinear), model(TOKENS).logits
    pairs = _taken_out(model)
    tuned = tune(model, pairs, kinds, examples, None, opened.steps.tune, tmp_path / "s.safetensors", 0, lambda *_: None)
    again = load_model(folder, torch.bfloat16)
    with torch.no_grad():
        for name, module in again.named_modules():
            if name in tuned.pairs:
                module.adapter.a.copy_(tuned.pairs[name].a)
                module.adapter.b.copy_(tuned.pairs[name].b)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        trained, written = model(TOKENS).logits, again(TOKENS).logits
    assert (trained - before).abs().max() > 0.5
    torch.testing.assert_close(trained.float(), written.float(), rtol=0.05, atol=0.1)


def test_defaults_are_those_of_the_reference():
    assert Config().learning_rate == 1e-4
    assert Config().length == 256
