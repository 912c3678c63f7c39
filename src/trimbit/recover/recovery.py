"""Recovery of compressed directories: the low-rank pairs are trained in the quantised state, the rest stays packed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from trimbit.calibrate.teacher import Teacher, teacher_outputs
from trimbit.errors import NumericsError
from trimbit.evaluate.perplexity import final_hidden
from trimbit.jobs.progress import Reporter
from trimbit.model.forward.logits import Divergence, compare_logits, following, logit_slices
from trimbit.model.forward.stream import BlockStream
from trimbit.recover.tune import Config, Example, Tuned, drawn, result_fields, tune
from trimbit.runtime.layers import AdaptedLinear, PackedLinear
from trimbit.runtime.load import load_model
from trimbit.schema.base import digest
from trimbit.transform.repair.lowrank import LowRank

TUNING_FILE = "tuning.json"


@dataclass(kw_only=True)
class Recovery:
    """Training for one model on one set of rows; a state that was broken off goes on, a finished one is taken up."""

    stream: BlockStream
    config: Config
    examples: Sequence[Example]
    held_out: Int[Tensor, "rows length"]
    seed: int
    teacher_cache: Path  # where the original's answers are kept
    states: Path  # where states of training are kept
    reporter: Reporter

    def train(self, folder: Path, steps: int | None = None) -> Tuned:
        """Train the pairs of a directory, named by its content; `steps` in place of the configuration's."""
        config, state = self._config(steps), self._state(folder, steps)
        original = self._original(config) if config.loss == "distill" else None
        model = load_model(folder, torch.bfloat16)
        pairs, kinds = _taken_out(model), (PackedLinear, AdaptedLinear)
        with self.reporter.stage("recovery") as progress:
            return tune(model, pairs, kinds, self.examples, original, config, state, self.seed, progress)

    def forget(self, folder: Path, steps: int | None = None) -> None:
        """Remove the state of a training."""
        self._state(folder, steps).unlink(missing_ok=True)

    def prepare(self, steps: int | None = None) -> None:
        """Compute what trainings of any plan share."""
        if self.config.loss == "distill":
            self._original(self._config(steps))
        self._original_held_out()

    def _config(self, steps: int | None) -> Config:
        return self.config if steps is None else self.config.model_copy(update={"steps": steps})

    def _state(self, folder: Path, steps: int | None) -> Path:
        decides = [folder.name, result_fields(self._config(steps)), self.rows, self.seed]
        return self.states / f"{digest(decides)}.safetensors"

    def _original(self, config: Config) -> Teacher:
        """The original, for the rows that training draws."""
        used = (self.examples[at].tokens for at in drawn(config, len(self.examples), self.seed))
        with self.reporter.stage("the original's answers") as progress:
            return teacher_outputs(self.stream, used, self.teacher_cache, progress)

    def divergence(self, model: PreTrainedModel) -> Divergence:
        """A model, run as it would be used, beside the original on the held-out rows.

        Raises:
            NumericsError: if its output is not finite.
        """
        original = self._original_held_out()
        total = torch.zeros(2, dtype=torch.float64)
        with self.reporter.stage("judging the recovered model") as progress:
            for at, row in enumerate(self.held_out):
                total += torch.tensor(_compared(original, model, row), dtype=torch.float64)
                progress(at + 1, len(self.held_out))
        if not bool(total.isfinite().all()):
            raise NumericsError("the recovered model's output is not finite: with a lower tune.learning_rate try again")
        return Divergence(*(total / len(self.held_out)).tolist())

    def _original_held_out(self) -> Teacher:
        with self.reporter.stage("the original's answers, held out") as progress:
            return teacher_outputs(self.stream, self.held_out, self.teacher_cache, progress)

    @cached_property
    def rows(self) -> str:
        """Content key of the rows."""
        return digest([[row.tokens.tolist(), row.loss_mask.tolist()] for row in self.examples])


@torch.inference_mode()
def _compared(original: Teacher, model: PreTrainedModel, row: Int[Tensor, " length"]) -> Divergence:
    taught = logit_slices(original.head, model.config, original.hidden(row))
    own = logit_slices(model.get_output_embeddings(), model.config, final_hidden(model, row))
    return compare_logits((torch.log_softmax(logits, -1) for _, logits in taught), own, following(row[None]))


def recovered(folder: Path, pairs: Mapping[str, LowRank]) -> PreTrainedModel:
    """The model of a compressed directory with other pairs."""
    model = load_model(folder, torch.bfloat16)
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


def tuning_note(tuned: Tuned, before: float | None) -> str:
    """The training in a line; `before` is the KL that it began with."""
    first, last = tuned.losses[0], tuned.losses[-1]
    held = f"pairs {tuned.trained_nbytes / 1e6:.1f} MB in fp32, optimiser {tuned.optimizer_nbytes / 1e6:.1f} MB"
    start = "" if before is None else f" from {before:.4f} nats,"
    return f"recovery:{start} {len(tuned.losses)} steps, loss {first:.4f} to {last:.4f}; {held}"


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
