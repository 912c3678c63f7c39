"""Every row of the family table, executed: cutting equals masking, permuting changes nothing."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from plans import make_plan
from tiny import MODEL_TYPES, VOCAB, randomize, tiny_config, tiny_model
from trimbit.errors import LayoutError
from trimbit.model.build import build_layout
from trimbit.model.families import FAMILIES, family_of
from trimbit.model.forward.absent import drop_unit
from trimbit.model.layout import Layout
from trimbit.model.resolved import cut_alone, resolve
from trimbit.transform.cut import cut_unit

CUTS = {
    "blocks.0.attn.kv": (2, 0),
    "blocks.0.mlp.mid": tuple(range(79, 20, -3)),
    "blocks.1.attn.kv": (1,),
    "blocks.2.mlp.mid": (5, 70, 7),
}


def biased_llama() -> PreTrainedModel:
    config = tiny_config("llama")
    config.attention_bias = config.mlp_bias = True
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, 0)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def cut(model: PreTrainedModel, layout: Layout, cuts: dict[str, tuple[int, ...]]) -> PreTrainedModel:
    for dim, keep in cuts.items():
        unit = layout.unit_of_dim(dim)
        if keep:
            cut_unit(model, layout, cut_alone(layout, unit, keep))
        else:
            drop_unit(model, unit)
    return model


def mask(model: PreTrainedModel, cuts: dict[str, tuple[int, ...]]) -> PreTrainedModel:
    """Zero what reads the removed channels; written without the family table."""
    for dim, keep in cuts.items():
        _, index, kind, _ = dim.split(".")
        block = model.model.layers[int(index)]
        linear, count = (block.self_attn.o_proj, 3) if kind == "attn" else (block.mlp.down_proj, 80)
        columns = linear.weight.data.view(48, count, -1)
        columns[:, [i for i in range(count) if i not in keep]] = 0
    return model


def test_every_row_has_a_tiny_model():
    assert set(MODEL_TYPES) == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_sub_block_of_a_tiny_model_matters(model_type, tied):
    """Else tests on it would prove nothing: dropping any one moves what is predicted for most tokens."""
    dense = tiny_model(model_type, tied=tied)
    layout, log_p = build_layout(dense.config), logits(dense).log_softmax(-1)
    assert 0.9 < log_p.std(-1).mean() < 4  # nats: neither all alike nor one certain
    for dim in (unit.dim for unit in layout.units.values() if unit.dim):
        log_q = logits(cut(deepcopy(dense), layout, {dim: ()})).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        assert kl.mean() > 0.05, dim
        assert kl.median() > 0.01, dim


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_layout_names_every_parameter(model_type, tied):
    model = tiny_model(model_type, tied=tied)
    layout = build_layout(model.config)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: spec.shape for name, spec in resolve(make_plan(layout), layout).tensors().items()} == parameters
    assert layout.parameters == model.num_parameters()
    assert layout.tied is tied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": ()}, r"layers\.0\.input_layernorm\.weight is not described"),
        ({"norms": ("input_layernorm", "other_norm")}, r"layers\.0\.other_norm\.weight is in its family row, but not"),
        (
            {"sites": {"a_in": {"self_attn.q_proj": "kv*d hidden"}, "o_in": {}}},
            r"q_proj has shape \(48, 48\).*\(24, 48",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_refused(monkeypatch, change, message):
    row = FAMILIES["llama"]
    monkeypatch.setitem(FAMILIES, "llama", replace(row, attn=replace(row.attn, **change)))
    with pytest.raises(LayoutError, match=message):
        build_layout(tiny_config("llama"))


@pytest.mark.parametrize(
    ("model_type", "near"), [("qwen2_moe", "qwen2"), ("gemma3n_text", "gemma3_text"), ("llama4", "llama")]
)
def test_an_unknown_family_names_the_nearest(model_type, near):
    with pytest.raises(LayoutError, match=f"'{model_type}'.*nearest known family is '{near}'"):
        family_of(model_type)


@pytest.mark.parametrize("make", [*FAMILIES, biased_llama])
def test_cutting_equals_masking(make):
    make_model = make if callable(make) else lambda: tiny_model(make)
    layout = build_layout(make_model().config)
    masked = logits(mask(make_model(), CUTS))
    assert (masked - logits(make_model())).abs().max() > 0.1
    torch.testing.assert_close(logits(cut(make_model(), layout, CUTS)), masked, rtol=0, atol=3e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_dropping_equals_masking_everything(model_type):
    cuts = {"blocks.0.attn.kv": (), "blocks.1.mlp.mid": (), "blocks.2.attn.kv": (), "blocks.2.mlp.mid": ()}
    model = tiny_model(model_type)
    layout = build_layout(model.config)
    masked = logits(mask(tiny_model(model_type), cuts))
    dropped = cut(model, layout, cuts)
    torch.testing.assert_close(logits(dropped), masked, rtol=0, atol=3e-5)
    left = dict(dropped.named_parameters())
    for dim in cuts:
        unit = layout.unit_of_dim(dim)
        gone = {*(f"{name}.weight" for name in unit.weights), *(name for name, _ in unit.kept)}
        assert not gone & left.keys()


@pytest.mark.parametrize("make", [*FAMILIES, biased_llama])
def test_permuting_changes_nothing_and_can_be_undone(make, generator):
    make_model = make if callable(make) else lambda: tiny_model(make)
    model = make_model()
    layout = build_layout(model.config)
    orders = {u.dim: torch.randperm(u.size, generator=generator) for u in layout.units.values() if u.dim}
    orders["blocks.0.attn.kv"] = torch.tensor([1, 2, 0])  # not its own inverse
    before, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    cut(model, layout, {dim: tuple(order.tolist()) for dim, order in orders.items()})
    moved = model.state_dict()
    assert not any(
        torch.equal(moved[f"{w}.weight"], state[f"{w}.weight"]) for w in layout.units["blocks.0.attn"].weights
    )
    torch.testing.assert_close(logits(model), before, rtol=0, atol=3e-5)
    cut(model, layout, {dim: tuple(order.argsort().tolist()) for dim, order in orders.items()})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
