"""The KL of one change, against full logits."""

import pytest
import torch
from torch.nn import functional

from measured import TOKENS
from tiny import tiny_model
from trimbit.measure.kl_probe import KLProbe
from trimbit.model.forward.in_memory import InMemoryModel


@pytest.fixture
def probe(stream):
    return KLProbe(InMemoryModel(stream), TOKENS)


@torch.no_grad()
def log_probabilities(model):
    return torch.log_softmax(model.float()(input_ids=TOKENS, use_cache=False).logits.double(), -1)


def kl(dense, changed):
    return float(functional.kl_div(changed, dense, log_target=True, reduction="sum")) / TOKENS.numel()


def noise(parameter, seed):
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return parameter.detach() + 0.2 * parameter.detach().float().std() * noise


def test_the_dense_model_has_no_damage(probe):
    assert probe.damage(None) == pytest.approx(0, abs=1e-4)
    assert all(probe.damage(block) == probe.damage(None) for block in range(3))


def test_damage_is_the_kl_of_full_logits(probe):
    whole = probe.whole
    dense = log_probabilities(tiny_copy(whole))
    name = "model.layers.1.mlp.down_proj.weight"
    whole.install({name: noise(whole.model.get_parameter(name), 1)})
    expected = kl(dense, log_probabilities(tiny_copy(whole)))
    assert expected > 1e-3
    assert probe.damage(None) == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_a_judge_of_few_plans_says_the_same(stream):
    whole = InMemoryModel(stream)
    often, seldom = KLProbe(whole, TOKENS), KLProbe(whole, TOKENS, repeated=False)
    assert seldom.damage(None) == pytest.approx(0, abs=1e-6)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"):
        whole.install({name: noise(whole.model.get_parameter(name), 1)})
        assert seldom.damage(None) == pytest.approx(often.damage(None), rel=1e-2, abs=1e-4)
        assert seldom.damage(None) > 1e-3


def tiny_copy(whole):
    """A plain transformers model of the same weights in fp32."""
    config = whole.model.config
    copy = tiny_model("llama", tied=config.tie_word_embeddings)
    state = {name: p.float() for name, p in whole.model.named_parameters()}
    missing = copy.load_state_dict(state, strict=False)
    biases = {unit.out_weight + ".bias" for unit in whole.layout.units.values() if unit.out_weight}
    assert set(missing.unexpected_keys) == biases
    assert all(not state[bias].any() for bias in biases)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    return copy


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.down_proj"])
def test_a_change_in_one_block_is_seen_from_there(probe, block, part):
    name = f"model.layers.{block}.{part}.weight"
    probe.whole.install({name: noise(probe.whole.model.get_parameter(name), block)})
    assert probe.damage(block) == pytest.approx(probe.damage(None), rel=1e-5)
    assert probe.damage(block) > 1e-4
    if block < 2:
        assert probe.damage(block + 1) == pytest.approx(0, abs=1e-4)  # nothing after it has changed
    probe.refresh()
    assert probe.damage(2) == pytest.approx(probe.damage(None), rel=1e-5)


def test_installing_and_taking_back(probe):
    whole, names = probe.whole, ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.bias")
    before = whole.current(names)
    assert not before[names[1]].any()  # a llama has no bias here: it is made for refits
    whole.install({names[0]: noise(before[names[0]], 0), names[1]: torch.ones(48)})
    assert probe.damage(None) > 1e-3
    whole.install(before)
    assert probe.damage(None) == pytest.approx(0, abs=1e-4)
