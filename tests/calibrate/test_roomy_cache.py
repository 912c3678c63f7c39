"""A cache with room holds what one that concatenates holds."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from tiny import VOCAB, save_tiny, tiny_model
from trimbit.calibrate.roomy_cache import ROOM, roomy_cache
from trimbit.model.forward.hf_names import CACHE

STEPS = [1, 1, 5, ROOM - 7, 1, 1, 3]  # tokens at a time: up to the room, and beyond it


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_a_model_gives_the_same(tmp_path, family):
    save_tiny(tiny_model(family).bfloat16(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(3, VOCAB, (3, sum(STEPS)), generator=torch.Generator().manual_seed(0))
    ours, theirs = roomy_cache(), DynamicCache(config=model.config)
    with torch.inference_mode():
        for part in tokens.split(STEPS, dim=1):
            own, other = (model(input_ids=part, use_cache=True, **{CACHE: one}).logits for one in (ours, theirs))
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert ours.get_seq_length() == sum(STEPS)


def test_tokens_before_are_not_copied():
    cache = roomy_cache()
    keys, _ = cache.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), 0)
    more, _ = cache.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), 0)
    assert more.data_ptr() == keys.data_ptr()
    assert more[0, 0, :, 0].tolist() == [1, 1, 1, 0]
