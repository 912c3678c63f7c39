"""Sensitivities against plain autograd on the whole model, and the KL that they predict against the real one."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tiny import VOCAB, save_tiny, tiny_model
from trimbit.calibrate.sensitivity import Change, sweep
from trimbit.errors import NumericsError
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream

TOKENS = torch.randint(3, VOCAB, (6, 20), generator=torch.Generator().manual_seed(0))
SMALL = 0.02


def nothing(*_):
    return {}


def run(stream, draws=1, seed=0, changes=nothing, tokens=TOKENS):
    weights, found, order = {}, {}, []
    for own in sweep(stream, tokens, draws, seed, changes, lambda *_: None):
        weights |= own.weights
        found |= own.changes
        order.append(list(own.weights))
    return weights, found, order


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen2", "phi3"])
def opened(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    save_tiny(tiny_model(request.param).bfloat16(), path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    checkpoint = open_checkpoint(path)
    return BlockStream(checkpoint, build_layout(checkpoint.config), torch.float32), model


def by_autograd(stream, model, labels):
    """Inputs and gradients of the outputs of every weight of the blocks, for the loss of these labels."""
    seen, handles = {}, []
    for name, weight in stream.layout.weights.items():
        if stream.layout.units[weight.unit].block is not None:

            def see(_module, args, out, name=name):
                out.retain_grad()
                seen[name] = args[0].detach(), out

            handles.append(model.get_submodule(name).register_forward_hook(see))
    embedded = stream.embed(TOKENS).requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {name: (x.flatten(0, 1), out.grad.flatten(0, 1)) for name, (x, out) in seen.items()}, embedded.grad


def drawn(stream, model, seed=0):
    """The labels that the sweep draws."""
    with torch.no_grad():
        logits = model(inputs_embeds=stream.embed(TOKENS), use_cache=False).logits.flatten(0, 1)
    p = torch.softmax(logits, -1)
    below, generator = p.cumsum(-1), torch.Generator().manual_seed(seed)
    points = torch.rand(len(p), 1, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, points, right=True)[:, 0], p


def test_equal_autograd_on_the_whole_model(opened):
    stream, model = opened
    layout = stream.layout
    labels, p = drawn(stream, model)
    deltas = {
        unit.block: Change(
            weight=unit.out_weight,
            delta=torch.randn(layout.weights[unit.out_weight].rows, layout.weights[unit.out_weight].cols),
            bias=torch.randn(layout.weights[unit.out_weight].rows),
        )
        for unit in layout.units.values()
        if unit.name.endswith(".mlp")
    }
    weights, changes, order = run(stream, changes=lambda index: {f"cut {index}": deltas[index]})
    expected, at_embedding = by_autograd(stream, model, labels)
    assert order[0] == [layout.family.head]
    assert order[-1] == [layout.family.embed]
    assert [own[0].split(".")[2] for own in order[1:-1]] == ["2", "1", "0"]
    for name, (x, g) in expected.items():
        weight = g.square().sum(1)
        torch.testing.assert_close(weights[name].rows, g.square().mean(0), rtol=2e-3, atol=1e-7)
        torch.testing.assert_close(weights[name].h, (x * weight[:, None]).T @ x / weight.sum(), rtol=2e-3, atol=1e-5)
    for index, change in deltas.items():
        x, g = expected[change.weight]
        along = ((x @ change.delta.T + change.bias) * g).sum(1)
        assert changes[f"cut {index}"] == pytest.approx(float(along.square().mean()) / 2, rel=2e-3)
    torch.testing.assert_close(weights[layout.family.head].rows, (p * (1 - p)).mean(0), rtol=1e-3, atol=1e-6)
    g2 = at_embedding.flatten(0, 1).square()
    read = weights[layout.family.embed]
    torch.testing.assert_close(read.h.diagonal(), g2.sum(0) / g2.sum(), rtol=2e-3, atol=1e-6)
    for token in TOKENS.flatten()[:5].tolist():
        own = g2[TOKENS.flatten() == token].sum() / TOKENS.numel()
        assert float(read.rows[token]) == pytest.approx(float(own), rel=2e-3)
    assert float(read.rows.sum()) == pytest.approx(float(g2.sum()) / TOKENS.numel(), rel=1e-3)


@pytest.mark.parametrize("opened", ["gemma2"], indirect=True)  # others are nearly indifferent
def test_labels_are_the_models_own(opened):
    """On text that the model finds unlikely, gradients of the text's own next tokens are far larger."""
    stream, model = opened
    weights, _, _ = run(stream, draws=8)
    of_text, _ = by_autograd(stream, model, TOKENS.roll(-1, 1).flatten())
    name = stream.layout.units["blocks.2.mlp"].out_weight
    assert float(of_text[name][1].square().mean(0).sum()) > 1.5 * float(weights[name].rows.sum())


@pytest.mark.parametrize("part", ["mlp", "attn"])
def test_independent_errors_have_about_the_predicted_kl(opened, part):
    stream, model = opened
    weights, _, _ = run(stream, draws=64)
    name = stream.layout.units[f"blocks.1.{part}"].weights[0]
    own, parameter = weights[name], model.get_parameter(f"{name}.weight")
    inputs = stream.embed(TOKENS)
    with torch.no_grad():
        before = torch.log_softmax(model(inputs_embeds=inputs, use_cache=False).logits, -1)
        real, predicted = [], []
        for seed in range(12):
            delta = (
                SMALL * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            )
            parameter += delta
            after = torch.log_softmax(model(inputs_embeds=inputs, use_cache=False).logits, -1)
            parameter -= delta
            real.append(float((before.double().exp() * (before.double() - after.double())).sum(-1).mean()))
            predicted.append(float(torch.linalg.vecdot(delta @ own.h, delta) @ own.rows) / 2)
    assert sum(predicted) == pytest.approx(sum(real), rel=0.4)


def test_more_draws_and_the_same_seed(opened):
    stream, _ = opened
    one, again, other = (run(stream, draws=2, seed=seed)[0] for seed in (0, 0, 1))
    name = stream.layout.units["blocks.0.mlp"].weights[0]
    assert torch.equal(one[name].h, again[name].h)
    assert not torch.equal(one[name].h, other[name].h)


def test_gradients_that_are_not_finite_name_the_weight(tmp_path):
    model = tiny_model("llama").bfloat16()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    save_tiny(model, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    stream = BlockStream(checkpoint, build_layout(checkpoint.config), torch.float32)
    with pytest.raises(NumericsError, match="output of block 1 is not finite"):
        run(stream)
