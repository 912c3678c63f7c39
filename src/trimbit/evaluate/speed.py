"""Speed of generation."""

import time

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from trimbit.model.forward.compute import finished
from trimbit.model.forward.hf_names import CACHE
from trimbit.runtime.kv_cache import cache_for


@torch.inference_mode()
def decode_speed(model: PreTrainedModel, prompt: Int[Tensor, " length"], tokens: int = 32) -> float:
    """Speed of greedy generation of one row after a short prompt, with a KV cache, in tokens per second."""
    cache = cache_for(model)
    out = model(input_ids=prompt[None].to(model.device), use_cache=True, logits_to_keep=1, **{CACHE: cache})
    finished(model.device)
    started = time.perf_counter()
    for _ in range(tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    finished(model.device)
    return tokens / (time.perf_counter() - started)
