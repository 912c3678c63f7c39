"""The model under masks: at the ends it is the plain quantised model, and its gradients are those of the formula."""

import pytest
import torch
from torch.nn import functional

from masked_jobs import ACTS, gradients, recipe, session
from sessions import open_session
from tiny import MODEL_TYPES, save_tiny, tiny_model
from trimbit.evaluate.perplexity import final_hidden
from trimbit.runtime.load import load_model
from trimbit.schema.recipe import Step
from trimbit.search.two_formats.tiles import TileProblem
from trimbit.trial.masked.inputs import MaskedLinear


@pytest.mark.parametrize("acts", [{}, ACTS], ids=["weights", "activations, too"])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("end", [0, 1])
def test_at_both_ends_it_is_the_plain_quantised_model(job, acts, sort, end):
    made = session(job, sort=sort, **acts)
    config = made.steps.search
    sites = TileProblem(made.problem(10**9), config)
    high = {site: range(end * count) for site, count in sites.channels.items()}
    applied = made.applied(sites.plan(high, "an end"))
    masks = {site: torch.full((count,), float(end)) for site, count in sites.channels.items()}
    masked = made.masked(config)
    found = masked.damage(masks)
    assert found.kl == pytest.approx(applied.measured.choose, rel=2e-2)
    assert found.kl > (0.01 if end == 0 else 1e-6)
    packed, row = load_model(applied.folder, torch.float32), made.text.choose.tokens[0]
    with torch.no_grad():
        torch.testing.assert_close(masked._final(row), final_hidden(packed, row), rtol=0, atol=1e-3)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_under_masks(job, tmp_path, model_type):
    save_tiny(tiny_model(model_type).bfloat16(), tmp_path / "model")
    made = open_session(tmp_path / "model", recipe(**ACTS), calibration=str(job.text), seed=3)
    sites = TileProblem(made.problem(10**9), made.steps.search)
    applied = made.applied(sites.plan(dict.fromkeys(sites.channels, ()), "all low"))
    masked, row = made.masked(made.steps.search), made.text.choose.tokens[0]
    masked._set({site: torch.zeros(count) for site, count in sites.channels.items()})
    packed = load_model(applied.folder, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(masked._final(row), final_hidden(packed, row), rtol=0, atol=1e-3)


@pytest.mark.parametrize("acts", [{}, ACTS], ids=["weights", "activations, too"])
@pytest.mark.parametrize("loss", ["lm", "kl"])
def test_gradients_are_those_of_the_formula(job, monkeypatch, acts, loss):
    made = session(job, loss=loss, **acts)
    model = made.masked(made.steps.search)
    generator = torch.Generator().manual_seed(0)
    masks = {
        site: (torch.rand(len(layers[0].inputs.order), generator=generator) < 0.5).float()
        for site, layers in model.layers.items()
    }
    value, found = gradients(model, masks, 1)
    model.checkpointing = False
    plain_value, plain = gradients(model, masks, 1)
    assert plain_value == value
    assert all(torch.equal(plain[site], own) for site, own in found.items())
    assert all(
        layer.inputs.last is None for layers in model.layers.values() for layer in layers
    )  # or checkpointing is in vain

    def formula(layer, x):
        """Both products, by autograd; rounding passes gradients straight through."""
        order = layer.inputs.order
        x, m = x[..., order], layer.inputs.mask[order]
        kinds = zip(layer.inputs.acts, (m < 0.5, m > 0.5), strict=True)
        low, high = (x if acts is None else x + (nearest(x.detach(), acts, own) - x.detach()) for acts, own in kinds)
        w_low, w_high = (own.packed.dense(x.dtype) for own in (layer.low, layer.high))
        return ((1 - m) * low) @ w_low.T + (m * high) @ w_high.T

    def nearest(x, acts, counted):
        """With the scales of the counted channels, in groups of their own; another has that of the next one."""
        top, stored = 2 ** (acts.bits - 1) - 1, (counted if counted.any() else ~counted).nonzero()[:, 0]
        groups = [acts.clip / top * x[..., part].abs().amax(-1, keepdim=True) for part in stored.split(32)]
        places = [min(int((stored < channel).sum()), len(stored) - 1) for channel in range(x.shape[-1])]
        scale = torch.cat([groups[place // 32] for place in places], -1)
        return (x / scale).round().clamp(-top - 1, top) * scale

    monkeypatch.setattr(MaskedLinear, "forward", formula)
    row = model.rows[1]
    leaves = {site: mask.clone().requires_grad_() for site, mask in masks.items()}
    model._set(leaves)
    logits = model.head(model._final(row)[:-1])
    if loss == "lm":
        want = functional.cross_entropy(logits, row[1:])
    else:
        taught = functional.linear(model.original.hidden(row)[:-1], made.stream.head().keywords["weight"]).log_softmax(
            -1
        )
        want = (taught.exp() * (taught - logits.log_softmax(-1))).sum(-1).mean()
    # sums in another order may round an input to the next code
    assert value == pytest.approx(float(want.detach()), rel=1e-3 if acts else 1e-4)
    want.backward()
    for site, leaf in leaves.items():
        off = float((found[site] - leaf.grad).norm() / leaf.grad.norm())
        assert off < (1e-2 if acts else 1e-3), site
    assert len(found) == 12


@pytest.mark.parametrize("acts", [{}, ACTS], ids=["weights", "activations, too"])
def test_kept_dense_they_give_the_same(job, acts):
    found = []
    for dense in (True, False):
        made = session(job, dense=dense, **acts)
        model = made.masked(made.steps.search)
        assert all((layer.low.packed is None) == dense for layers in model.layers.values() for layer in layers)
        masks = {site: torch.arange(len(own[0].inputs.order)) % 3 // 2 for site, own in model.layers.items()}
        found.append(gradients(model, {site: mask.float() for site, mask in masks.items()}, 0))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(own, found[1][1][site]) for site, own in found[0][1].items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rtn", "expected"])
def test_what_is_tried_around_a_background_is_judged_as_if_alone(job, kind):
    made = session(job, loss="kl", error_model=kind)  # so that the original's answers on these rows are there
    model = made.masked(made.steps.search)
    zeros = {site: torch.zeros(len(own[0].inputs.order)) for site, own in model.layers.items()}
    tried = [zeros] + [zeros | {site: torch.ones(len(zeros[site]))} for site in zeros] + [zeros]
    around = [model.damage(masks, 3) for masks in tried]
    for masks, found in zip(tried, around, strict=True):
        model.backgrounds.clear()
        assert found == pytest.approx(model.damage(masks, 3), rel=1e-6)
    model.held_out = model.rows[:3]
    for alone, found in zip([model.damage(masks) for masks in tried], around, strict=True):
        assert found.kl == pytest.approx(alone.kl, rel=1e-3, abs=2e-5)
        assert found.nll == pytest.approx(alone.nll, rel=1e-6)
    assert len({found.kl for found in around}) == len(zeros) + 1


@pytest.mark.parametrize("kind", ["rtn", "expected"])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_bf16_on_a_cpu_with_instructions_for_it_or_without(job, monkeypatch, kind, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = []
    for compute in ("bfloat16", "float32"):
        own = recipe(error_model=kind, loss="kl", **ACTS).model_copy(update={"compute": compute})
        made = open_session(job.model, own, calibration=str(job.text), seed=3)
        model = made.masked(made.steps.search)
        native = torch.bfloat16 if (compute, capability) == ("bfloat16", "AVX512") else torch.float32
        assert model.layers["blocks.1.mlp.mid"][0].inputs.compute is native
        masks = {site: (torch.arange(len(own[0].inputs.order)) % 2).float() for site, own in model.layers.items()}
        found.append((model.damage(masks).nll, model.damage(masks, 1).nll, gradients(model, masks, 0)[0]))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=0.1)
    assert found[0][2] == pytest.approx(found[1][2], rel=0.15)  # bf16 rounds what a tiny model hardly feels


def test_every_step_takes_the_next_rows(job):
    made = session(job, batch=2)
    model = made.masked(made.steps.search)
    assert model.rows.shape == (6, 16)  # 3 rows of 32
    assert set(map(tuple, model.rows.tolist())).isdisjoint(map(tuple, made.text.fit.tokens.view(-1, 16).tolist()))
    masks = {site: torch.ones(len(layers[0].inputs.order)) for site, layers in model.layers.items()}
    values = [gradients(model, masks, step)[0] for step in range(4)]
    assert values[0] == values[3] != values[1]
    model.batch = 6
    assert gradients(model, masks, 0)[0] == pytest.approx(sum(values[:3]) / 3, rel=1e-5)


def test_the_versions_are_the_quantiser_s_if_asked(job):
    near = session(job, error_model="rtn")
    by_gptq = recipe(error_model="quantizer").model_copy(update={"quant": Step(name="gptq")})
    own = open_session(job.model, by_gptq, calibration=str(job.text), seed=3)
    layers = [made.masked(made.steps.search).layers["blocks.1.mlp.mid"][0] for made in (near, own)]
    assert not torch.equal(layers[0].low.packed.codes, layers[1].low.packed.codes)
