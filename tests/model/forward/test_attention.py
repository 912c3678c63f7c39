"""Grouped attention against each family's eager one, with a prompt, with a cache and inside a sliding window."""

import pytest
import torch

from tiny import VOCAB, tiny_model
from trimbit.model.forward.attention import NAME, grouped
from trimbit.model.forward.hf_names import CACHE

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


@torch.no_grad()
def outputs(model, tokens, prompt):
    """Logits of a prompt, and of each token that follows."""
    out = model(input_ids=tokens[:, :prompt], use_cache=True)
    found = [out.logits]
    for at in range(prompt, tokens.shape[1]):
        out = model(input_ids=tokens[:, at : at + 1], use_cache=True, **{CACHE: out[CACHE]})
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_eager_attention(model_type):
    model = tiny_model(model_type).eval()
    tokens = torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    expected = outputs(model, tokens, 7)
    with grouped(model):
        assert model.config._attn_implementation == NAME
        torch.testing.assert_close(outputs(model, tokens, 7), expected, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "eager"


def test_the_model_is_as_before_after_an_error():
    model = tiny_model("llama")
    before = model.config._attn_implementation

    def fail():
        with grouped(model):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.config._attn_implementation == before
