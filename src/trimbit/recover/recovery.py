"""Recovery of compressed directories: the low-rank pairs are trained on the quantised model, which stays packed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from trimbit.calibrate.teacher import Teacher
from trimbit.errors import NumericsError
from trimbit.evaluate.perplexity import final_hidden
from trimbit.jobs.progress import Progress
from trimbit.model.forward.logits import Divergence, compare_logits, following, log_softmax, logit_slices
from trimbit.model.forward.stream import CPU
from trimbit.recover.tune import Config, Example, Tuned, tune
from trimbit.runtime.layers import AdaptedLinear, PackedLinear
from trimbit.runtime.load import load_model
from trimbit.transform.repair.lowrank import LowRank


def train_pairs(
    folder: Path, config: Config, examples: Sequence[Example], teacher: Teacher | None, state: Path, seed: int,
    progress: Progress, device: torch.device = CPU,
) -> Tuned:  # fmt: skip
    """Train the pairs of a compressed directory; an interrupted run goes on from `state`."""
    model = load_model(folder, torch.bfloat16, device)
    pairs, kinds = _taken_out(model), (PackedLinear, AdaptedLinear)
    taught = teacher.to(device) if teacher is not None else None
    return tune(model, pairs, kinds, examples, taught, config, state, seed, progress)


def divergence(
    model: PreTrainedModel, teacher: Teacher, rows: Int[Tensor, "rows length"], progress: Progress
) -> Divergence:
    """The divergence of a model, run as in use, from the original.

    Raises:
        NumericsError: if the model's output is not finite.
    """
    total, teacher = torch.zeros(2, dtype=torch.float64), teacher.to(model.device)
    for at, row in enumerate(rows):
        total += torch.tensor(_compared(teacher, model, row), dtype=torch.float64)
        progress(at + 1, len(rows))
    if not bool(total.isfinite().all()):
        raise NumericsError("the recovered model's output is not finite; lower tune.learning_rate")
    return Divergence(*(total / len(rows)).tolist())


@torch.inference_mode()
def _compared(teacher: Teacher, model: PreTrainedModel, row: Int[Tensor, " length"]) -> Divergence:
    reference = logit_slices(teacher.head, model.config, teacher.hidden(row))
    own = logit_slices(model.get_output_embeddings(), model.config, final_hidden(model, row))
    return compare_logits((log_softmax(logits) for _, logits in reference), own, following(row[None]))


def with_pairs(folder: Path, pairs: Mapping[str, LowRank], device: torch.device = CPU) -> PreTrainedModel:
    """The model of a compressed directory with these pairs in place of its own."""
    model = load_model(folder, torch.bfloat16, device)
    with torch.no_grad():
        for name, module in _layers(model).items():
            module.adapter.a.copy_(pairs[name].a)
            module.adapter.b.copy_(pairs[name].b)
    return model


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear | AdaptedLinear) and module.adapter is not None
    }


def _taken_out(model: PreTrainedModel) -> dict[str, LowRank]:
    """Remove the pairs from a model and return them."""
    pairs = {}
    for name, module in _layers(model).items():
        pairs[name] = LowRank(a=module.adapter.a.detach().float(), b=module.adapter.b.detach().float())
        module.adapter = None
    return pairs


def adapter_tensors(pairs: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Pairs under their stored names."""
    stored = {f"{name}.adapter.a": pair.a.to(torch.bfloat16) for name, pair in pairs.items()}
    return stored | {f"{name}.adapter.b": pair.b.to(torch.bfloat16) for name, pair in pairs.items()}
