"""A naive cache of keys and values that keeps everything exactly and quantises when it is read, in numpy."""

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tiny import VOCAB
from trimbit.schema.kv_cache import KVPrecision

KV4 = KVPrecision(bits=4, group=5, sink_tokens=2, recent_tokens=3)  # heads have 8 channels: groups of 5 and 3


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


def generate(model, length=20, padded=0, **kwargs):
    prompt = tokens(2, length)
    mask = torch.ones_like(prompt)
    mask[0, :padded] = 0
    return model.generate(
        prompt, attention_mask=mask, do_sample=False, min_new_tokens=8, max_new_tokens=8,
        return_dict_in_generate=True, output_logits=True, **kwargs,
    )  # fmt: skip
