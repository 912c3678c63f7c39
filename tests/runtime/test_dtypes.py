"""Types: of the original's files, and of the model that a compressed directory is loaded as."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from plans import runs
from small_models import written_small
from tiny import VOCAB, tiny_model
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.runtime.layers import Packed
from trimbit.runtime.load import load_model

TOKENS = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3_text", "phi3"])
def small(request, tmp_path_factory):
    return written_small(tiny_model(request.param), tmp_path_factory.mktemp(request.param), rows=(8, 20))[:3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_loaded_in_sixteen_bits(small, dtype):
    """Packed weights stay packed; logits are near those in fp32; text is generated."""
    folder, _, plan = small
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    want = torch.float16 if dtype is torch.float16 else torch.bfloat16
    assert model.dtype is want
    assert {parameter.dtype for parameter in model.parameters()} == {want}
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
    assert packed.keys() == {
        name for name, own in plan.weights.items() if {run.precision.name for run in own} != {"bf16"}
    }
    assert all(module.codes.dtype is torch.uint8 and module.scales.dtype is torch.float16 for module in packed.values())
    assert not any(hasattr(module, "weight") for module in packed.values())
    found, exact = logits(model), logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert found.dtype is want
    assert 0 < (found.float() - exact).norm() < 0.05 * exact.norm()
    mask = torch.ones_like(TOKENS)
    made = model.generate(TOKENS, attention_mask=mask, do_sample=False, min_new_tokens=4, max_new_tokens=4)
    assert made.shape == (2, 24)
    last = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(made[:, :-1]).logits[:, 19:]
    gap = last.amax(-1) - last.gather(-1, made[:, 20:, None]).squeeze(-1)
    assert gap.max() < 0.1 * last.std()  # what is chosen is the best in fp32, or as good


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "phi3"])
def test_an_original_in_fp16_is_read_exactly(model_type, tmp_path):
    """Its values are not those of bf16: the same written in fp32 gives the same bytes, and the same logits."""
    model = tiny_model(model_type).half()
    half = written_small(model, tmp_path / "half", rows=(8, 20))[0]
    assert open_checkpoint(half.parent / "original").tensor("model.norm.weight").dtype is torch.float16
    wide = tiny_model(model_type)
    wide.load_state_dict(model.state_dict())
    full = written_small(wide, tmp_path / "full", rows=(8, 20))[0]
    assert (half / "model.safetensors").read_bytes() == (full / "model.safetensors").read_bytes()
    assert not torch.equal(wide.model.norm.weight, wide.model.norm.weight.bfloat16().float())
    assert torch.equal(logits(load_model(half.parent / "original", torch.float32)), logits(wide))
    assert AutoModelForCausalLM.from_pretrained(half).dtype is torch.bfloat16


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_eight_bits_of_an_original_in_fp16_are_near_it(model_type, tmp_path):
    model = tiny_model(model_type).half()
    small = written_small(model, tmp_path, lambda _, cols: runs((cols, "uint8g32")), (), (8, 20), cuts={})[0]
    want = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32))
    found = logits(AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32))
    assert (found - want).norm() < 0.02 * want.norm()
