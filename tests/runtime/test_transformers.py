"""A compressed directory, loaded by transformers, is the original with dequantised weights and masked channels."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from plans import make_plan, runs
from small_models import masked_original, written_small
from tiny import VOCAB, save_tiny, tiny_model
from trimbit.artifact.files import is_compressed, weight_nbytes
from trimbit.errors import ArtifactError, CheckpointError
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.absent import NoAttention, NoFeedForward
from trimbit.model.forward.hf_names import CACHE
from trimbit.model.forward.stream import BlockStream
from trimbit.model.resolved import resolve
from trimbit.runtime.layers import Packed
from trimbit.transform.apply import apply_plan
from trimbit.transform.quant import rtn
from trimbit.transform.repair import refit
from trimbit.transform.weight import WeightCompressor
from written import writing

CASES = {"llama": False, "qwen3": True, "gemma2": True, "gemma3_text": True, "phi3": False}  # tied


def compress(model_type, folder, *how):
    return written_small(tiny_model(model_type, tied=CASES[model_type]), folder, *how)[:3]


@pytest.fixture(scope="module", params=CASES)
def small(request, tmp_path_factory):
    return compress(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return compress("llama", tmp_path_factory.mktemp("llama"))


def tokens(length=20):
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def test_logits_are_those_of_the_masked_original(small):
    folder, layout, plan = small
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    original = masked_original(folder, layout, plan)
    assert type(model) is type(original)
    torch.testing.assert_close(model(tokens()).logits, original(tokens()).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_it_still_resembles_the_original_where_nothing_is_cut(tmp_path):
    """8 bits everywhere: a scrambled order of tensors or channels would not pass for this."""
    save_tiny(tiny_model("llama"), tmp_path / "original")
    checkpoint = open_checkpoint(tmp_path / "original")
    layout = build_layout(checkpoint.config)
    plan = make_plan(layout, lambda _, cols: runs((cols, "int8g32")))
    with writing(tmp_path / "small", layout, plan) as writer:
        stream, method = (
            BlockStream(checkpoint, layout, torch.float32),
            WeightCompressor(module=rtn, config=rtn.Config()),
        )
        apply_plan(stream, plan, tokens(), method, refit.Config(), None, writer, lambda *_: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    logits, want = model(tokens()).logits, tiny_model("llama")(tokens()).logits
    assert (logits - want).square().mean() < 1e-3 * want.square().mean()


def test_cached_generation_equals_uncached(small):
    model = AutoModelForCausalLM.from_pretrained(small[0], dtype=torch.float32)
    prompt, mask = tokens(12), torch.ones(2, 12, dtype=torch.long)

    def generate(model, **kwargs):
        return model.generate(
            prompt, attention_mask=mask, do_sample=False, min_new_tokens=8, max_new_tokens=8, **kwargs
        )

    cached = generate(model, use_cache=True)
    assert cached.shape == (2, 20)
    assert torch.equal(cached, generate(model, use_cache=False))
    assert torch.equal(cached, generate(masked_original(*small), use_cache=True))


def test_the_cache_counts_tokens_where_block_0_has_no_attention(llama):
    model = AutoModelForCausalLM.from_pretrained(llama[0], dtype=torch.float32)
    assert isinstance(model.model.layers[0].self_attn, NoAttention)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens()[:, :11], **{CACHE: cache}, use_cache=True)
        assert cache.get_seq_length() == 11
        last = model(tokens()[:, 11:], **{CACHE: cache}, use_cache=True).logits
        assert cache.get_seq_length() == 20
        torch.testing.assert_close(last, model(tokens()).logits[:, 11:], rtol=0, atol=1e-5)


def test_weights_stay_packed_and_are_as_large_as_the_plan_says(small):
    folder, layout, plan = small
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype is torch.bfloat16
    model(tokens())
    for name, expected in plan.weights.items():
        module = model.get_submodule(name)
        if len(expected) == 1 and expected[0].precision.name == "bf16":
            assert not isinstance(module, Packed)
            continue
        assert isinstance(module, Packed)
        assert module.runs == expected
        assert module.codes.dtype is torch.uint8
        assert module.scales.dtype is torch.float16
        assert {n for n, _ in module.named_parameters()} <= {"bias"}
    held = [*model.parameters(), *(b for m in model.modules() if isinstance(m, Packed) for b in m.buffers())]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == resolve(plan, layout).nbytes
    assert weight_nbytes(folder) == resolve(plan, layout).file_nbytes
    assert isinstance(model.model.layers[1].mlp, NoFeedForward)
    assert "runs=[20xint7row, 3xbf16" in repr(model)
    assert is_compressed(folder)
    assert not is_compressed(folder.parent / "original")


@torch.no_grad()
def test_in_bf16_a_weight_is_its_fp32_value_rounded_once(tmp_path):
    """With scales rounded before they are multiplied, 8 bits would err as much as their own step."""
    folder, _, _ = compress("llama", tmp_path, lambda _, cols: runs((cols, "int8g32")), ())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype is torch.bfloat16
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
    assert len(packed) > 10
    for module in packed.values():
        exact = module.dense(torch.float32)
        assert torch.equal(module.dense(torch.bfloat16), exact.bfloat16())
        if hasattr(module, "in_features"):
            x = torch.randn(5, module.in_features).bfloat16()
            assert torch.equal(module(x), torch.nn.functional.linear(x, exact.bfloat16(), module.bias))


@torch.no_grad()
def test_unquantised_plans_work_too(tmp_path):
    folder, layout, plan = compress("phi3", tmp_path, lambda _, cols: runs((cols, "bf16")), ())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not any(isinstance(module, Packed) for module in model.modules())
    torch.testing.assert_close(
        model(tokens()).logits, masked_original(folder, layout, plan)(tokens()).logits, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", ["nf4g32", "ternaryg32", "binaryrow", "mbinaryg32"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # untied, tied: the table is packed as well
@torch.no_grad()
def test_codebooks_everywhere(name, model_type, tmp_path):
    folder, layout, plan = compress(model_type, tmp_path, lambda _, cols: runs((cols, name)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(tokens()).logits
    torch.testing.assert_close(logits, masked_original(folder, layout, plan)(tokens()).logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(tokens()[:1, :1]).logits, logits[:1, :1], rtol=0, atol=1e-4)
    assert weight_nbytes(folder) == resolve(plan, layout).file_nbytes


def test_save_pretrained_is_refused(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama[0])
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "copy")
    assert not list(tmp_path.glob("copy/*.safetensors"))


def test_compressing_twice_is_refused(llama):
    with pytest.raises(CheckpointError, match="already compressed"):
        open_checkpoint(llama[0])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version": 1', '"format_version": 2', "format version 2"),
        ("1.self_attn.o_proj", "1.self_attn.p_proj", r"disagree on 2 weights.*o_proj"),
        ('"count": 48', '"cuont": 48', r"structure\.weights.*count: Field required"),
        ('"blocks.0.attn.kv": 0', '"blocks.0.attn.kv": 1', r"disagree on 4 weights.*layers\.0"),
    ],
)
def test_an_edited_config_is_refused(llama, tmp_path, old, new, message):
    folder = shutil.copytree(llama[0], tmp_path / "x")
    config = (folder / "config.json").read_text()
    assert old in config
    (folder / "config.json").write_text(config.replace(old, new))
    with pytest.raises(ArtifactError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_missing_weights_are_refused(llama, tmp_path):
    folder = shutil.copytree(llama[0], tmp_path / "x")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.self_attn.q_proj.codes"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"disagree on 1 tensors.*q_proj\.codes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_without_trimbit_loading_fails_loudly(llama):
    code = (
        "import sys; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(llama[0])], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"ValueError: .*model type `trimbit`.*does not recognize", done.stderr, re.DOTALL)
