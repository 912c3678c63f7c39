"""The packed cache against a naive one that keeps everything exactly and quantises what it reads, in numpy."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kv_caches import KV4, generate, naive_cache, tokens
from plans import make_plan
from tiny import MODEL_TYPES, tiny_config, tiny_model
from trimbit.errors import PlanError
from trimbit.model.build import build_layout
from trimbit.model.forward.hf_names import CACHE
from trimbit.model.resolved import resolve
from trimbit.runtime.kv_cache import PackedCache, PackedLayer, pack_cache
from trimbit.schema.kv_cache import KVPrecision


def fake(x, precision):
    """Quantise and dequantise all tokens."""
    out = []
    for part in np.split(x.float().numpy(), range(precision.group, x.shape[-1], precision.group), axis=-1):
        low = part.min(-1, keepdims=True).astype(np.float16).astype(np.float32)
        step = ((part.max(-1, keepdims=True) - low) / np.float32(2**precision.bits - 1)).clip(0).astype(np.float16)
        step = step.astype(np.float32)
        codes = np.rint((part - low) / np.where(step == 0, 1, step)).clip(0, 2**precision.bits - 1)
        out.append(codes * step + low)
    return torch.from_numpy(np.concatenate(out, -1)).to(x.dtype)


def states(length, heads=3, channels=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 2, heads, length, channels, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "precision",
    [
        KV4,
        KVPrecision(bits=3, group=8, sink_tokens=0, recent_tokens=0),
        KVPrecision(bits=2, group=4, sink_tokens=0, recent_tokens=6),
        KVPrecision(bits=5, group=8, sink_tokens=6, recent_tokens=0),
        KVPrecision(bits=8, group=8, sink_tokens=40, recent_tokens=3),
    ],
)
def test_what_is_stored_does_not_depend_on_the_calls(precision, dtype):
    keys, values = states(20, dtype=dtype)
    together = PackedLayer(precision)
    together.update(keys, values)
    for calls in ([1] * 20, [7, 1, 1, 5, 6], [3, 17], [1, 1, 18]):
        layer = PackedLayer(precision)
        for new_keys, new_values in zip(keys.split(calls, dim=2), values.split(calls, dim=2), strict=True):
            layer.update(new_keys, new_values)
        for half, other in zip(layer.stored, together.stored, strict=True):
            for one, two in zip(half.tensors(), other.tensors(), strict=True):
                assert torch.equal(one, two)
    assert together.get_seq_length() == 20
    sink = min(precision.sink_tokens, 20)
    end = max(20 - precision.recent_tokens, sink)
    empty = torch.zeros(2, 3, 0, 8, dtype=dtype)
    for half, exact, read in zip(together.stored, (keys, values), together.update(empty, empty), strict=True):
        assert torch.equal(half.sink, exact[:, :, :sink])
        assert torch.equal(half.recent, exact[:, :, end:])
        assert torch.equal(read[:, :, :sink], exact[:, :, :sink])
        assert torch.equal(read[:, :, end:], exact[:, :, end:])
        if end > sink:
            assert torch.equal(read[:, :, sink:end], fake(exact[:, :, sink:end], precision))


def test_a_call_reads_its_own_tokens_exactly():
    keys, values = states(20)
    layer = PackedLayer(KV4)
    assert all(torch.equal(read, exact) for read, exact in zip(layer.update(keys, values), (keys, values), strict=True))


def test_nothing_larger_is_held_in_memory():
    layer = PackedLayer(KVPrecision(sink_tokens=2, recent_tokens=3))
    layer.update(*states(100)[:, :1, :1])  # one row, one head: slices of it are contiguous views
    held = [tensor for half in layer.stored for tensor in half.tensors()]
    assert [tensor.untyped_storage().nbytes() for tensor in held] == [t.numel() * t.element_size() for t in held]


def test_rows_follow_the_beams():
    layer = PackedLayer(KV4)
    layer.update(*states(12))
    before = [tensor.clone() for half in layer.stored for tensor in half.tensors()]
    layer.reorder_cache(torch.tensor([1, 1]))
    assert all(torch.equal(t, old[[1, 1]]) for t, old in zip(tensors(layer), before, strict=True))
    layer.batch_repeat_interleave(2)
    assert all(torch.equal(t, old[[1, 1, 1, 1]]) for t, old in zip(tensors(layer), before, strict=True))
    layer.batch_select_indices(torch.tensor([3]))
    assert all(torch.equal(t, old[[1]]) for t, old in zip(tensors(layer), before, strict=True))
    layer.reset()
    assert (layer.get_seq_length(), layer.stored) == (0, ())
    with pytest.raises(NotImplementedError, match="cannot remove tokens"):
        layer.crop(-1)


def tensors(layer):
    return [tensor for half in layer.stored for tensor in half.tensors()]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_that_with_the_naive_cache(model_type, beams):
    model = tiny_model(model_type)
    want = generate(model, **{CACHE: naive_cache(model, KV4)}, num_beams=beams)
    exact = generate(model, num_beams=beams)
    pack_cache(model, KV4)
    found = generate(model, num_beams=beams)
    assert torch.equal(found.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(want.logits), rtol=0, atol=1e-5)
    assert (torch.stack(found.logits)[1] - torch.stack(exact.logits)[1]).abs().max() > 1e-3
    assert isinstance(found[CACHE], PackedCache)
    assert found[CACHE].get_seq_length() == 27


def test_a_batch_with_padding_on_the_left():
    model = tiny_model("llama")
    want = generate(model, padded=5, **{CACHE: naive_cache(model, KV4)})
    plain = generate(model, **{CACHE: naive_cache(model, KV4)})
    pack_cache(model, KV4)
    found = generate(model, padded=5)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(want.logits), rtol=0, atol=1e-5)
    assert torch.equal(found.sequences, want.sequences)
    assert not torch.allclose(found.logits[0][0], plain.logits[0][0], atol=1e-3)


@torch.no_grad()
def test_a_step_by_hand():
    """Every product of one decoding step of a llama written out, with keys and values of an exact prefill."""
    model, prompt = tiny_model("llama"), tokens(2, 15)
    past, cache = DynamicCache(config=model.config), PackedCache(model, KV4)
    model(prompt[:, :14], **{CACHE: past})
    model(prompt[:, :14], **{CACHE: cache})
    x = model.model.embed_tokens(prompt[:, 14:])
    cos, sin = model.model.rotary_emb(x, torch.tensor([[14]]))
    for block, layer in zip(model.model.layers, past.layers, strict=True):
        attn, h = block.self_attn, block.input_layernorm(x)
        q, k, v = (p(h).view(2, 1, -1, 8).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        keys, values = (
            torch.cat([old[:, :, :2], fake(old[:, :, 2:11], KV4), old[:, :, 11:], new], dim=2)
            for old, new in ((layer.keys, k), (layer.values, v))
        )
        out = torch.empty(2, 6, 8)
        for row in range(2):
            for head in range(6):
                weights = torch.softmax(keys[row, head // 2] @ q[row, head, 0] / 8**0.5, 0)
                out[row, head] = weights @ values[row, head // 2]
        x = x + attn.o_proj(out.view(2, 1, 48))
        h = block.post_attention_layernorm(x)
        x = x + block.mlp.down_proj(functional.silu(block.mlp.gate_proj(h)) * block.mlp.up_proj(h))
    want = model.lm_head(model.model.norm(x))
    found = model(prompt[:, 14:], **{CACHE: cache}).logits
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_error_falls_with_bits():
    model, text = tiny_model("qwen3"), tokens(2, 40)
    want = model(text).logits[:, -1]
    errors = []
    for bits in (2, 4, 8):
        cache = PackedCache(model, KVPrecision(bits=bits, sink_tokens=1, recent_tokens=2))
        model(text[:, :-1], **{CACHE: cache})
        errors.append((model(text[:, -1:], **{CACHE: cache}).logits[:, -1] - want).square().mean().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


@pytest.mark.parametrize("group", [9, 64])
def test_a_group_longer_than_a_head_is_refused(group):
    layout = build_layout(tiny_config("llama"))
    plan = make_plan(layout)
    resolve(plan.model_copy(update={"kv_cache": KVPrecision(group=8)}), layout)
    with pytest.raises(PlanError, match=f"the group has {group} channels, but head_dim is only 8"):
        resolve(plan.model_copy(update={"kv_cache": KVPrecision(group=group)}), layout)
    with pytest.raises(PlanError, match=f"the group has {group} channels, but head_dim is only 8"):
        pack_cache(tiny_model("llama"), KVPrecision(group=group))
    with pytest.raises(PlanError, match=f"the group has {group} channels, but head_dim is only 8"):
        PackedCache(tiny_model("llama"), KVPrecision(group=group))


def test_a_model_with_nothing_to_quantise_is_refused():
    config = tiny_config("mistral")
    config.sliding_window = 16
    layout = build_layout(config)
    resolve(make_plan(layout), layout)
    with pytest.raises(PlanError, match="every layer of this model has a sliding window"):
        resolve(make_plan(layout).model_copy(update={"kv_cache": KVPrecision()}), layout)
