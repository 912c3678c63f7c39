"""Scaled rotary embeddings and sliding windows: as in the original, while it is compressed and when it is loaded."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from small_models import masked_original, written_small
from tiny import VOCAB, tiny_model
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.logits import logit_slices
from trimbit.model.forward.stream import BlockStream

LENGTH = 24
THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, **THETA,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, **THETA}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.0, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": LENGTH - 1, **THETA,
}  # fmt: skip
GEMMA = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", **THETA},
}
ROPES = {
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}}),
    "llama, dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LENGTH // 3}),
    "mistral, yarn": ("mistral", {"rope_parameters": YARN}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3, yarn": ("qwen3", {"rope_parameters": YARN}),
    "gemma3, linear": ("gemma3_text", {"rope_parameters": GEMMA}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": LENGTH - 1}),
    "phi3, partial": ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}}),
}
WINDOWS = {
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {}),
}
NO_WINDOW = {"sliding_window": 10**6}


def tokens(length=LENGTH):
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model, length=LENGTH):
    return model(tokens(length), use_cache=False).logits


def block_by_block(folder):
    """Logits as they are when moments, damage and KL are measured."""
    checkpoint = open_checkpoint(folder)
    stream = BlockStream(checkpoint, build_layout(checkpoint.config), torch.float32)
    hidden = stream.embed(tokens())
    for index in range(3):
        hidden = stream.run(index, stream.load(index), hidden)
    slices = logit_slices(stream.head(), checkpoint.config, stream.final_norm(hidden).flatten(0, 1))
    return torch.cat([part for _, part in slices]).view(2, LENGTH, VOCAB).detach()


def apart(found, want):
    return float((found - want).norm() / want.norm())


def check(model, other, folder):
    """The written model is the masked original; `other`, the same weights by another config, would not pass for it."""
    other.load_state_dict(model.state_dict())
    small, layout, plan, kls = written_small(model, folder, rows=(8, LENGTH), held_out=tokens())
    assert apart(block_by_block(folder / "original"), logits(model)) < 0.01  # the stream's table is in bf16
    assert apart(logits(other), logits(model)) > 0.1
    loaded, masked = (
        AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32),
        masked_original(small, layout, plan),
    )
    for length in (LENGTH, LENGTH // 2, LENGTH):  # what depends on the length must not stay
        torch.testing.assert_close(logits(loaded, length), logits(masked, length), rtol=0, atol=1e-4)
    log_p, log_q = (logits(one).double().log_softmax(-1) for one in (model, loaded))
    assert kls == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean(-1).tolist(), rel=0.02)
    return loaded, masked


@pytest.mark.parametrize("name", ROPES)
def test_scaled_rotary_embeddings(name, tmp_path):
    model_type, changes = ROPES[name]
    model = tiny_model(model_type, **changes)
    assert model.config.rope_parameters == changes["rope_parameters"]
    check(model, tiny_model(model_type), tmp_path)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_shorter_than_a_row(name, tmp_path):
    model_type, changes = WINDOWS[name]
    model = tiny_model(model_type, **changes)
    loaded, masked = check(model, tiny_model(model_type, **changes | NO_WINDOW), tmp_path)
    prompt, mask = tokens(12), torch.ones(2, 12, dtype=torch.long)
    cached, whole, want = (
        one.generate(
            prompt, attention_mask=mask, do_sample=False, min_new_tokens=8, max_new_tokens=8, use_cache=use_cache
        )
        for one, use_cache in ((loaded, True), (loaded, False), (masked, True))
    )
    assert torch.equal(cached, whole)
    assert torch.equal(cached, want)
