"""Compressed models that keep keys and values packed, as their plans say."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from kv_caches import KV4, generate, naive_cache, tokens
from plans import make_plan, runs
from tiny import save_tiny, tiny_model
from trimbit.evaluate.perplexity import READ_TOKENS, final_hidden, read_hidden
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.absent import NoAttention
from trimbit.model.forward.hf_names import CACHE
from trimbit.model.forward.stream import BlockStream
from trimbit.model.kv_nbytes import cache_nbytes
from trimbit.model.resolved import resolve
from trimbit.runtime.kv_cache import CountingLayer, PackedCache, cache_for, precision_of
from trimbit.transform.apply import apply_plan
from trimbit.transform.quant import rtn
from trimbit.transform.repair import refit
from trimbit.transform.weight import WeightCompressor
from written import writing

CUTS = {"blocks.0.attn.kv": (), "blocks.1.attn.kv": (2, 0), "blocks.2.mlp.mid": ()}


def compress(folder, model_type="llama", kv_cache=KV4):
    """Save a tiny model with its first attention dropped and its second one cut."""
    save_tiny(tiny_model(model_type), folder / "original")
    checkpoint = open_checkpoint(folder / "original")
    layout = build_layout(checkpoint.config)
    plan = make_plan(layout, lambda _, cols: runs((cols, "int8row")), CUTS).model_copy(update={"kv_cache": kv_cache})
    resolve(plan, layout)
    stream, method = BlockStream(checkpoint, layout, torch.float32), WeightCompressor(module=rtn, config=rtn.Config())
    with writing(folder / "small", layout, plan) as writer:
        apply_plan(stream, plan, tokens(2, 32), method, refit.Config(), None, writer, lambda *_: None)
    return folder / "small", layout, plan


@pytest.fixture(scope="module", params=["llama", "gemma2", "phi3"])
def small(request, tmp_path_factory):
    return compress(tmp_path_factory.mktemp(request.param), request.param)


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


def test_models_from_before_it_load(tmp_path):
    folder, _, _ = compress(tmp_path, kv_cache=None)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["structure"].pop("kv_cache") is None
    (folder / "config.json").write_text(json.dumps(fields))
    assert precision_of(AutoModelForCausalLM.from_pretrained(folder)) is None
