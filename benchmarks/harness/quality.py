"""Quality of a model on a text: perplexity, KL to the original, and how often the first choice is the same."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.bench import TEST, Bench
from harness.origin import file_digest
from trimbit.calibrate.text import evaluation_windows
from trimbit.evaluate.perplexity import final_hidden, read_hidden, score
from trimbit.jobs.checked import load_tensors, save_tensors
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.compute import fastest_device
from trimbit.runtime.kv_cache import pack_cache, precision_of
from trimbit.runtime.layers import PackedLinear
from trimbit.runtime.load import load_model, load_tokenizer
from trimbit.schema.base import digest
from trimbit.schema.kv_cache import KVPrecision


def quality(
    bench: Bench, path: Path, original: Path, text: str = TEST, kv_cache: KVPrecision | None = None
) -> dict[str, float]:
    """Perplexity, KL(original || model) in nats per token, and the share of tokens with the same first choice, in bf16.

    Measured on the first windows of a text, on a GPU if there is one. The KV cache is quantised as `kv_cache` says, or
    else as the model's plan says; without either it is exact.
    """
    device = fastest_device()
    windows = _windows(bench, original, text).to(device)
    dense = load_model(original, torch.bfloat16).to(device)  # type: ignore[arg-type]
    reference = _reference(bench, dense, original, windows, text)
    model = load_model(path, torch.bfloat16).to(device)  # type: ignore[arg-type]
    if kv_cache is not None:
        pack_cache(model, kv_cache)
    if precision_of(model) is not None:
        _keep_dense(model)
    totals = torch.zeros(3, dtype=torch.float64)
    for window, hidden, own in zip(windows, read_hidden(model, windows), reference, strict=True):
        totals += score(model, hidden, window, (dense, own.to(device)))
    nll, kl, top1 = (totals / (len(windows) * (bench.context - 1))).tolist()
    return {f"ppl@{bench.context}": math.exp(nll), "kl": kl, "top1": top1}


def perplexity(bench: Bench, path: Path, text: str, context: int) -> float:
    """Perplexity at a shorter context on the same part of a text, in bf16 on the CPU."""
    max_windows = bench.windows * bench.context // context
    windows = evaluation_windows(bench.data / text, load_tokenizer(path), context=context, max_windows=max_windows)
    model = load_model(path, torch.bfloat16)
    total = sum(float(score(model, final_hidden(model, window), window, None)[0]) for window in windows)
    return math.exp(total / (len(windows) * (context - 1)))


def _windows(bench: Bench, original: Path, text: str) -> Tensor:
    tokenizer = load_tokenizer(original)
    return evaluation_windows(bench.data / text, tokenizer, context=bench.context, max_windows=bench.windows)


def _reference(bench: Bench, dense: PreTrainedModel, original: Path, windows: Tensor, text: str) -> Sequence[Tensor]:
    """The original's last hidden states for each window, computed once."""
    key = digest(
        [open_checkpoint(original).weights_hash(), file_digest(bench.data / text), *windows.shape, windows.device.type,
         torch.__version__]
    )  # fmt: skip
    path = bench.work / "dense" / f"{original.name}-{key[:16]}.safetensors"
    found = load_tensors(path)
    if found is None:
        save_tensors(path, {str(at): final_hidden(dense, window).clone() for at, window in enumerate(windows)})
        found = load_tensors(path)
    assert found is not None, f"{path} was just written"
    return [found[0][str(at)] for at in range(len(windows))]


def _keep_dense(model: PreTrainedModel) -> None:
    """Dequantise weights once rather than in each of many short reads: faster, with the same figures."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            kept = {torch.bfloat16: layer.dense(torch.bfloat16)}
            layer.dense = kept.__getitem__  # type: ignore[method-assign,assignment]
