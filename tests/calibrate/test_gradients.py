"""Gradients block by block against those of the whole model at once."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tiny import VOCAB, save_tiny, tiny_model
from trimbit.calibrate.gradients import coupled, sweep
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream

TOKENS = torch.randint(3, VOCAB, (4, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen2", "phi3"])
def found(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    save_tiny(tiny_model(request.param).bfloat16(), path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    checkpoint = open_checkpoint(path)
    stream = BlockStream(checkpoint, build_layout(checkpoint.config), torch.float32)
    steps, gradients, order = [], {}, []
    for index, own in sweep(stream, TOKENS, lambda *step: steps.append(step)):
        gradients |= own
        order.append(index)
    assert order == [2, 1, 0]
    assert steps == [(at + 1, 6) for at in range(6)]
    return stream, model, gradients


def of_sample(stream, model, row):
    """Gradients of one row's loss, by plain autograd on the whole model."""
    model.zero_grad()
    logits = model(inputs_embeds=stream.embed(row[None]), use_cache=False).logits[0]  # Gemma scales it in bf16
    functional.cross_entropy(logits[:-1], row[1:]).backward()
    return {
        name: model.get_parameter(f"{name}.weight").grad.clone()
        for name, weight in stream.layout.weights.items()
        if stream.layout.units[weight.unit].block is not None
    }


def test_equal_autograd_on_the_whole_model(found):
    stream, model, gradients = found
    samples = [of_sample(stream, model, row) for row in TOKENS]
    assert gradients.keys() == samples[0].keys()
    for name, gradient in gradients.items():
        each = torch.stack([sample[name] for sample in samples])
        torch.testing.assert_close(gradient.g, each.mean(0), rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(gradient.fisher, each.square().mean(0), rtol=4e-3, atol=1e-8)
        assert torch.equal(gradient.w, model.get_parameter(f"{name}.weight").detach())


def test_a_dim_sees_rows_of_what_writes_and_columns_of_what_reads(found):
    stream, _, gradients = found
    layout = stream.layout
    for unit in layout.units.values():
        if unit.dim is None:
            continue
        parts = coupled(layout, unit, {name: gradients[name] for name in unit.weights})
        assert len(parts) == len(unit.weights)
        for part, name in zip(parts, unit.weights, strict=True):
            assert part.axis == (1 if name == unit.out_weight else 0)
            assert len(part.member) == part.gradient.w.shape[part.axis]
            assert part.member.min() >= 0
            counts = part.member.bincount(minlength=unit.size)
            assert len(counts) == unit.size
            assert bool((counts == counts[0]).all())
