"""The packed cache against a naive one that keeps everything exactly and quantises what it reads, in numpy."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from plans import make_plan, runs
from tiny import MODEL_TYPES, VOCAB, save_tiny, tiny_config, tiny_model
from trimbit.artifact.writer import Writer
from trimbit.errors import PlanError
from trimbit.evaluate.perplexity import READ_TOKENS, final_hidden, read_hidden
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.absent import NoAttention
from trimbit.model.forward.hf_names import CACHE
from trimbit.model.forward.stream import BlockStream
from trimbit.model.kv_nbytes import cache_nbytes
from trimbit.runtime.kv_cache import CountingLayer, PackedCache, PackedLayer, cache_for, pack_cache, precision_of
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import Plan
from trimbit.transform.apply import apply_plan
from trimbit.transform.quant import rtn
from trimbit.transform.repair import refit
from trimbit.transform.weight import Method

KV4 = KVPrecision(bits=4, group=5, sink_tokens=2, recent_tokens=3)  # heads have 8 channels: groups of 5 and 3
CUTS = {"blocks.0.attn.kv": (), "blocks.1.attn.kv": (2, 0), "blocks.2.mlp.mid": ()}


def tokens(rows, length, seed=7):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


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


class NaiveLayer(DynamicLayer):
    def __init__(self, precision):
        super().__init__()
        self.precision = precision

    def update(self, keys, values, *args, **kwargs):
        past = self.get_seq_length()
        first, end = self.precision.sink_tokens, past - self.precision.recent_tokens
        read = []
        for exact in super().update(keys, values):
            mixed = exact.clone()
            if end > first:
                mixed[:, :, first:end] = fake(exact[:, :, first:end], self.precision)
            read.append(mixed)
        return tuple(read)


def naive_cache(model, precision):
    cache = DynamicCache(config=model.config)
    cache.layers = [layer if layer.is_sliding else NaiveLayer(precision) for layer in cache.layers]
    return cache


def compress(folder, model_type="llama", kv_cache=KV4):
    """Save a tiny model with its first attention dropped and its second one cut."""
    save_tiny(tiny_model(model_type), folder / "original")
    checkpoint = open_checkpoint(folder / "original")
    layout = build_layout(checkpoint.config)
    plan = make_plan(layout, lambda _, cols: runs((cols, "int8row")), CUTS).model_copy(update={"kv_cache": kv_cache})
    layout.check(plan)
    stream, method = BlockStream(checkpoint, layout, torch.float32), Method(module=rtn, config=rtn.Config())
    with Writer(folder / "small", layout, plan) as writer:
        apply_plan(stream, plan, tokens(2, 32), method, refit.Config(), None, writer, lambda *_: None)
    return folder / "small", layout, plan


@pytest.fixture(scope="module", params=["llama", "gemma2", "phi3"])
def small(request, tmp_path_factory):
    return compress(tmp_path_factory.mktemp(request.param), request.param)


# --- what is stored --------------------------------------------------------------------------------------------------


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
    with pytest.raises(NotImplementedError, match="cannot take tokens back"):
        layer.crop(-1)


def tensors(layer):
    return [tensor for half in layer.stored for tensor in half.tensors()]


# --- generation ------------------------------------------------------------------------------------------------------


def generate(model, length=20, padded=0, **kwargs):
    prompt = tokens(2, length)
    mask = torch.ones_like(prompt)
    mask[0, :padded] = 0
    return model.generate(
        prompt, attention_mask=mask, do_sample=False, min_new_tokens=8, max_new_tokens=8,
        return_dict_in_generate=True, output_logits=True, **kwargs,
    )  # fmt: skip


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


def test_a_compressed_model_uses_the_cache_of_its_plan(small):
    folder, layout, _ = small
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model.model.layers[0].self_attn, NoAttention)
    assert precision_of(model) == KV4
    found = generate(model)
    cache = found[CACHE]
    assert isinstance(cache, PackedCache)
    assert type(cache.layers[0]) is CountingLayer
    assert [cache.get_seq_length(index) for index in range(3)] == [27] * 3
    assert torch.equal(found.sequences, generate(model, **{CACHE: naive_cache(model, KV4)}).sequences)
    if layout.config.model_type == "llama":
        assert [layer.stored[0].sink.shape[1] for layer in cache.layers[1:]] == [2, 3]  # kv heads
    assert torch.equal(generate(model, num_beams=2).sequences[:, :20], tokens(2, 20))


def test_the_caller_has_the_last_word(small):
    model = AutoModelForCausalLM.from_pretrained(small[0], dtype=torch.float32)
    exact = generate(model, use_cache=False)
    assert exact.get(CACHE) is None
    for asked in ({"cache_implementation": "dynamic"}, {CACHE: DynamicCache(config=model.config)}):
        found = generate(model, **asked)
        assert type(found[CACHE]) is DynamicCache
        assert torch.equal(found.sequences, exact.sequences)
    model.generation_config.use_cache = False
    assert generate(model).get(CACHE) is None
    given = GenerationConfig(do_sample=False)  # which says nothing of a cache
    assert model.generate(tokens(1, 4), given, max_new_tokens=1, return_dict_in_generate=True).get(CACHE) is None


@pytest.mark.parametrize("small", ["gemma2"], indirect=True)
def test_the_cache_that_gemma_s_files_name_is_no_wish(small):
    model = AutoModelForCausalLM.from_pretrained(small[0], dtype=torch.float32)
    model.generation_config.cache_implementation = "hybrid"
    assert type(generate(model)[CACHE]) is PackedCache


def test_a_conversation_goes_on_with_its_cache(small):
    model = AutoModelForCausalLM.from_pretrained(small[0], dtype=torch.float32)
    first = generate(model)
    more = torch.cat([first.sequences, tokens(2, 3, seed=8)], dim=1)
    found = model.generate(
        more, attention_mask=torch.ones_like(more), **{CACHE: first[CACHE]}, do_sample=False,
        max_new_tokens=2, min_new_tokens=2,
    )  # fmt: skip
    assert found.shape == (2, 33)
    assert first[CACHE].get_seq_length() == 32


def test_without_it_in_the_plan_nothing_changes(tmp_path):
    folder, _, _ = compress(tmp_path, kv_cache=None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert precision_of(model) is None
    assert "generate" not in vars(model)
    assert type(cache_for(model)) is DynamicCache
    assert type(generate(model)[CACHE]) is DynamicCache


# --- sizes and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4, 6, 40])
@torch.no_grad()
def test_bytes_are_those_of_the_tensors(small, length):
    folder, layout, plan = small
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = cache_for(model)
    model(tokens(1, length), **{CACHE: cache})
    assert cache.nbytes == cache_nbytes(layout.config, plan.widths, KV4, length)
    exact = DynamicCache(config=model.config)
    model(tokens(1, length), **{CACHE: exact})
    held = [tensor for layer in exact.layers[1:] for tensor in (layer.keys, layer.values)]  # the first has no attention
    assert sum(t.numel() * t.element_size() for t in held) == cache_nbytes(layout.config, plan.widths, None, length)


def test_bytes_by_hand():
    config = tiny_config("llama")  # 3 blocks, 3 kv heads of 8 channels
    assert cache_nbytes(config, {}, None, 100) == 100 * 3 * 3 * 8 * 2 * 2
    packed = 4 + 2 * 2 * 2  # 8 codes of 4 bits; a scale and a minimum for each of two groups
    assert KV4.token_nbytes(8) == packed
    assert cache_nbytes(config, {}, KV4, 100) == 3 * 3 * 2 * (5 * 16 + 95 * packed)
    assert cache_nbytes(config, {"blocks.0.attn.kv": 0, "blocks.2.attn.kv": 1}, KV4, 100) == 4 * 2 * (
        5 * 16 + 95 * packed
    )
    assert cache_nbytes(tiny_config("gemma2"), {}, KV4, 100) == 3 * 2 * (2 * 7 * 16 + 5 * 16 + 95 * packed)
    assert [KVPrecision(bits=bits).token_nbytes(64) for bits in (2, 3, 4, 8)] == [20, 28, 36, 68]


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


def test_evaluation_reads_through_the_cache(small):
    model = AutoModelForCausalLM.from_pretrained(small[0], dtype=torch.float32)
    windows = tokens(3, 2 * READ_TOKENS + 9)
    for window, found in zip(windows, read_hidden(model, windows), strict=True):
        cache = naive_cache(model, KV4)
        for part, read in zip(window.split(READ_TOKENS), found.split(READ_TOKENS), strict=True):
            with torch.no_grad():
                want = model.get_decoder()(input_ids=part[None], **{CACHE: cache}).last_hidden_state[0]
            torch.testing.assert_close(read, want, rtol=0, atol=1e-5)
        exact = final_hidden(model, window)
        torch.testing.assert_close(found[:READ_TOKENS], exact[:READ_TOKENS], rtol=0, atol=1e-5)
        assert (found - exact)[READ_TOKENS:].abs().max() > 1e-3


@pytest.mark.parametrize("group", [9, 64])
def test_a_group_longer_than_a_head_is_refused(group):
    layout = build_layout(tiny_config("llama"))
    plan = make_plan(layout)
    layout.check(plan.model_copy(update={"kv_cache": KVPrecision(group=8)}))
    with pytest.raises(PlanError, match=f"a group of {group} channels, but head_dim is 8"):
        layout.check(plan.model_copy(update={"kv_cache": KVPrecision(group=group)}))
    with pytest.raises(PlanError, match=f"a group of {group} channels, but head_dim is 8"):
        pack_cache(tiny_model("llama"), KVPrecision(group=group))
    with pytest.raises(PlanError, match=f"a group of {group} channels, but head_dim is 8"):
        PackedCache(tiny_model("llama"), KVPrecision(group=group))


def test_a_model_with_nothing_to_quantise_is_refused():
    config = tiny_config("mistral")
    config.sliding_window = 16
    layout = build_layout(config)
    layout.check(make_plan(layout))
    with pytest.raises(PlanError, match="every layer of this model has a sliding window"):
        layout.check(make_plan(layout).model_copy(update={"kv_cache": KVPrecision()}))


@pytest.mark.parametrize(
    "fields",
    [{"bits": 1}, {"bits": 9}, {"group": 0}, {"sink_tokens": -1}, {"recent_tokens": -1}, {"bits": "4"}, {"b": 4}],
)
def test_what_is_no_precision_is_refused(fields):
    with pytest.raises(ValidationError):
        KVPrecision.model_validate(fields)


def test_plans_from_before_it_load():
    plan = make_plan(build_layout(tiny_config("llama")))
    fields = json.loads(plan.model_dump_json())
    assert fields.pop("kv_cache") is None
    assert Plan.model_validate_json(json.dumps(fields)) == plan
    packed = plan.model_copy(update={"kv_cache": KV4})
    assert Plan.model_validate_json(packed.model_dump_json()) == packed


def test_models_from_before_it_load(tmp_path):
    folder, _, _ = compress(tmp_path, kv_cache=None)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["structure"].pop("kv_cache") is None
    (folder / "config.json").write_text(json.dumps(fields))
    assert precision_of(AutoModelForCausalLM.from_pretrained(folder)) is None
