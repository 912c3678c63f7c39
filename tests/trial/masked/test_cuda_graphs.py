"""Blocks that a GPU replays."""

from functools import partial

import pytest
import torch

from masked_jobs import ACTS, gradients, recipe, session
from trimbit.pipeline import search
from trimbit.pipeline.masks import masked_model
from trimbit.search.methods import toga
from trimbit.trial.masked import model as masked


class Recorded(torch.autograd.Function):
    """A block whose gradients lie in the same memory in each run, as those of a CUDA graph."""

    @staticmethod
    def forward(ctx, block, kept, *inputs):
        ctx.inputs, ctx.kept = [own.detach().requires_grad_() for own in inputs], kept
        with torch.enable_grad():
            ctx.out = block(*ctx.inputs)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, grad):
        for at, own in enumerate(torch.autograd.grad(ctx.out, ctx.inputs, grad)):
            ctx.kept.setdefault(at, torch.empty_like(own)).copy_(own)
        return None, None, *(own.detach() for own in ctx.kept.values())


def test_rows_of_a_step_add_up_where_blocks_are_replayed(job, monkeypatch):
    made = session(job, dense=True, checkpointing=False, batch=3)
    model = masked_model(made.job, made.prepared, made.steps.search)
    generator = torch.Generator().manual_seed(0)
    masks = {
        site: (torch.rand(len(layers[0].inputs.order), generator=generator) < 0.5).float()
        for site, layers in model.layers.items()
    }
    plain = gradients(model, masks, 0)
    monkeypatch.setattr(masked, "recorded", lambda blocks, *_: [partial(Recorded.apply, own, {}) for own in blocks])
    monkeypatch.setattr(masked, "replay", run_all)
    model.cuda_graphs = True
    for step in (1, 0):
        found = gradients(model, masks, step)
    assert found[0] == pytest.approx(plain[0])
    torch.testing.assert_close(found[1], plain[1])


def run_all(blocks, hidden, masks, _seed):
    for run, own in zip(blocks, masks, strict=True):
        hidden = run(hidden, *own)
    return hidden


@pytest.mark.parametrize(
    ("params", "replayed"),
    [
        ({"error_model": "expected"}, True),
        ({"dense": True}, True),
        ({}, False),  # packed
        ({"dense": True, "low_acts": ACTS["low_acts"]}, False),
        ({"error_model": "expected", "high_acts": ACTS["high_acts"]}, False),
    ],
)
def test_what_a_gpu_replays_is_in_the_key(job, params, replayed):
    """Noise is another then; on a CPU nothing is replayed, and blocks that are run twice give the same masks."""
    whole = {"checkpointing": False} | params
    config = toga.Config(**recipe(**whole).search.params)
    assert config.cuda_graphs("cuda") == replayed
    assert not config.cuda_graphs("cpu")
    assert not config.model_copy(update={"checkpointing": True}).cuda_graphs("cuda")
    both = [session(job, **whole | {"checkpointing": twice}) for twice in (True, False)]
    prepared = [made.prepared for made in both]
    for gpu in (True, False):
        for made in both:
            made.job.__dict__["device"] = torch.device("cuda" if gpu else "cpu")
        keys = {search._key(made.job, own, 40_000).digest for made, own in zip(both, prepared, strict=True)}
        assert len(keys) == 1 + (gpu and replayed)


EXACT = {"error_model": "expected", "high": "bf16", "loss": "kl"}


REPLAYED = {"low_acts": None, "high_acts": None, "checkpointing": False}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "kind",
    [{}, {"dense": True} | REPLAYED, EXACT, EXACT | REPLAYED | {"loss": "lm"}],
    ids=["rounded", "rounded, replayed", "expected", "expected, replayed"],
)
def test_a_gpu_gives_the_same_gradients(job, kind):
    """Where noise is expected all channels are exact, for it is another on another kind of device."""
    made = session(job, **ACTS | kind)
    found = []
    for gpu in (True, False):
        made.job.__dict__["device"] = torch.device("cuda" if gpu else "cpu")
        model = masked_model(made.job, made.prepared, made.steps.search)
        generator, share = torch.Generator().manual_seed(0), 1.0 if "high" in kind else 0.5
        masks = {
            site: (torch.rand(len(layers[0].inputs.order), generator=generator) < share).float()
            for site, layers in model.layers.items()
        }
        assert model.cuda_graphs == (gpu and not kind.get("checkpointing", True))
        gradients(model, {site: 1 - mask for site, mask in masks.items()}, 1)  # what is recorded is none of the masks'
        found.append(gradients(model, masks, 0))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.05, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replayed_noise_is_that_of_its_seed(job):
    made = session(job, **EXACT | REPLAYED | {"high": "int8g32"})
    model = masked_model(made.job, made.prepared, made.steps.search)
    masks = {site: torch.zeros(len(layers[0].inputs.order)) for site, layers in model.layers.items()}
    before = torch.cuda.get_rng_state()
    first, again = (gradients(model, masks, 0) for _ in range(2))
    assert first[0] == again[0]
    torch.testing.assert_close(first[1], again[1], rtol=0, atol=0)
    steps = range(0, 8 * len(model.rows), len(model.rows))  # of one row
    others = [gradients(model, masks, step)[0] for step in steps]
    assert len(set(others)) == 8
    assert torch.equal(torch.cuda.get_rng_state(), before)
    model.cuda_graphs = False
    plain = [gradients(model, masks, step)[0] for step in steps]
    assert sum(others) / 8 == pytest.approx(sum(plain) / 8, rel=0.1)
