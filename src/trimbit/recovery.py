"""Recovery of a compressed directory: its low-rank pairs are trained in the quantised state, the rest stays packed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from trimbit.evaluate import final_hidden, load_model
from trimbit.model.head import kl, logit_slices
from trimbit.progress import Progress
from trimbit.repair.lowrank import LowRank
from trimbit.repair.tune import Config, Example, Original, Tuned, tune
from trimbit.runtime import AdaptedLinear, PackedLinear

TUNING_FILE = "tuning.json"


def recover(
    folder: Path, original: Original | None, examples: Sequence[Example], config: Config, state: Path, seed: int,
    progress: Progress,
) -> Tuned:  # fmt: skip
    """Train the pairs of a compressed directory; distilling needs the original."""
    model = load_model(folder, torch.bfloat16)
    return tune(
        model, _taken_out(model), (PackedLinear, AdaptedLinear), examples, original, config, state, seed, progress
    )


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear | AdaptedLinear) and module.adapter is not None
    }


def _taken_out(model: PreTrainedModel) -> dict[str, LowRank]:
    """The pairs of a model, which then runs without them."""
    pairs = {}
    for name, module in _layers(model).items():
        pairs[name] = LowRank(a=module.adapter.a.detach().float(), b=module.adapter.b.detach().float())
        module.adapter = None
    return pairs


def adapter_tensors(pairs: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Pairs under their stored names."""
    stored = {f"{name}.adapter.a": pair.a.to(torch.bfloat16) for name, pair in pairs.items()}
    return stored | {f"{name}.adapter.b": pair.b.to(torch.bfloat16) for name, pair in pairs.items()}


def tuning_record(tuned: Tuned) -> str:
    """The loss curve and the bytes of training, as JSON."""
    return json.dumps(
        {
            "losses": tuned.losses,
            "trained_nbytes": tuned.trained_nbytes,
            "optimizer_nbytes": tuned.optimizer_nbytes,
        },
        indent=1,
    )


def held_out_kl(
    folder: Path, pairs: Mapping[str, LowRank], original: Path, tokens: Int[Tensor, "rows length"], progress: Progress
) -> float:
    """KL(original || model with these pairs) in nats a token, both run as they would be used: whole, in bf16."""
    model, reference = load_model(folder, torch.bfloat16), load_model(original, torch.bfloat16)
    with torch.no_grad():
        for name, module in _layers(model).items():
            module.adapter.a.copy_(pairs[name].a)
            module.adapter.b.copy_(pairs[name].b)
    total = 0.0
    for at, row in enumerate(tokens):
        heads = [
            logit_slices(each.get_output_embeddings(), each.config, final_hidden(each, row))
            for each in (reference, model)
        ]
        with torch.inference_mode():
            for (_, p), (_, q) in zip(*heads, strict=True):
                total += kl(torch.log_softmax(p, -1), torch.log_softmax(q, -1))
        progress(at + 1, len(tokens))
    return total / tokens.numel()
