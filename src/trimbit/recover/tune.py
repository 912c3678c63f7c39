"""Train the low-rank pairs of frozen, packed weights: LoRA through PEFT, by instructions or by distillation.

The whole model is in memory as it is stored; only the pairs have gradients, in fp32. Every step draws its rows and its
dropout from the seed and the step's number, so that an interrupted run ends as if it had not been interrupted.
"""

import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimbit.calibrate.teacher import Teacher
from trimbit.errors import RecipeError
from trimbit.jobs.progress import Progress
from trimbit.jobs.state import load_state, require_finite, save_state
from trimbit.model.forward.compute import products_in
from trimbit.model.forward.logits import logit_slices, loss_gradient
from trimbit.runtime.inputs import move_hooks
from trimbit.schema.base import Schema
from trimbit.transform.repair.lowrank import LowRank

ADVICE = "Lower tune.learning_rate to retrain from scratch"
PAPER = "LoRA, arXiv:2106.09685; LLM-Pruner's recovery, arXiv:2305.11627"


class Config(Schema):
    """How the pairs are trained."""

    data: str | None = None  # a .jsonl file of instructions; None: the calibration text, by distillation
    loss: Literal["instruct", "distill"] = "distill"
    steps: int = Field(default=100, ge=1)  # ours, for two cores; code (horseee/LLM-Pruner): 2 epochs of 50,000 rows
    batch: int = Field(default=16, ge=1)  # ours; code (horseee/LLM-Pruner): 64
    micro: int = Field(default=4, ge=1)  # rows run at a time
    length: int = Field(default=256, ge=16)  # code (horseee/LLM-Pruner): tokens of a row
    learning_rate: float = Field(default=1e-4, gt=0)  # code (horseee/LLM-Pruner)
    warmup: float = Field(default=0.1, ge=0, lt=1)  # ours: share of the steps; then linear decay to zero
    alpha: int = Field(default=16, ge=1)  # code (horseee/LLM-Pruner): the pair is scaled by alpha / rank
    dropout: float = Field(default=0.0, ge=0, lt=1)  # ours, for one epoch; code (horseee/LLM-Pruner): 0.05
    checkpointing: bool = False  # keep only each block's input, and run the block again for its gradients
    save_every: int = Field(default=20, ge=1)  # steps between two stored states


def result_fields(config: Config) -> dict[str, Any]:
    """The fields of the configuration that decide the result, besides the rows in `data`."""
    return config.model_dump(mode="json", exclude={"data", "save_every", "checkpointing"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row of tokens, and which of them are to be predicted."""

    tokens: Int[Tensor, " length"]
    loss_mask: Bool[Tensor, " length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The trained pairs, the loss of every step, and the bytes that training held besides the frozen weights."""

    pairs: dict[str, LowRank]
    losses: list[float]
    trained_nbytes: int  # the pairs in fp32
    optimizer_nbytes: int


def require_peft() -> None:
    """Fail early if the pairs cannot be trained.

    Raises:
        RecipeError: if peft is missing.
    """
    if importlib.util.find_spec("peft") is None:
        raise RecipeError("recovery needs peft: pip install 'trimbit[tune]'")


def tune(
    model: PreTrainedModel, pairs: Mapping[str, LowRank], kinds: Sequence[type[nn.Module]],
    examples: Sequence[Example], original: Teacher | None, config: Config, state: Path, seed: int, progress: Progress,
) -> Tuned:  # fmt: skip
    """Train `pairs`, given by the names of their layers, in a model whose layers are of `kinds`.

    `original` is needed to distil. `state` is the checkpoint from which an interrupted run resumes.

    Raises:
        NumericsError: if a loss, gradient or parameter is not finite, naming the step. The last stored state stays.
    """
    from peft.helpers import disable_input_dtype_casting

    lora = _attach(model, pairs, kinds, config)
    parameters = {f"{name}.{part}": p for name, own in lora.items() for part, p in zip("ab", own, strict=True)}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    metadata = load_state(state, parameters, optimizer)
    losses: list[float] = json.loads(metadata["losses"]) if metadata else []
    kept = len(losses)
    model.train()
    if config.checkpointing:
        # by its newer name, if there is one: transformers 6 drops the older
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for step in range(len(losses), config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        # autocast casts the pairs to bf16; casting each layer's input to fp32 first would hold it twice
        with torch.random.fork_rng(devices=_seeded(model.device)), disable_input_dtype_casting(model):
            torch.manual_seed(seed * 1_000_003 + step)  # for dropout
            loss = _step(model, examples, original, config, seed, step)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        require_finite("recovery", step + 1, kept, ADVICE, loss=[torch.tensor(loss)], gradient=gradients)
        optimizer.step()
        optimizer.zero_grad()
        require_finite("recovery", step + 1, kept, ADVICE, parameter=parameters.values())
        losses.append(loss)
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save_state(state, parameters, optimizer, {"losses": json.dumps(losses)})
            kept = step + 1
        progress(step + 1, config.steps)
    model.eval()
    found = {}
    for name, (a, b) in lora.items():
        scale = config.alpha / a.shape[0]
        found[name] = LowRank(a=_bf16(a.detach()).cpu(), b=_bf16(b.detach() * scale).cpu())
    moments = [value for p in parameters.values() for key, value in optimizer.state[p].items() if key != "step"]
    trained = _nbytes(parameters.values())
    return Tuned(pairs=found, losses=losses, trained_nbytes=trained, optimizer_nbytes=_nbytes(moments))


def _seeded(device: torch.device) -> list[torch.device]:
    """The devices besides the CPU whose generators dropout draws from."""
    return [device] if device.type == "cuda" else []


def _nbytes(tensors: Any) -> int:  # noqa: ANN401
    return sum(t.numel() * t.element_size() for t in tensors)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _attach(
    model: PreTrainedModel, pairs: Mapping[str, LowRank], kinds: Sequence[type[nn.Module]], config: Config
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Put PEFT's layers around the frozen ones; returns A and B of each by the layer's name."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import Linear

    ranks = {name: pair.a.shape[0] for name, pair in pairs.items()}
    rank = next(iter(ranks.values()))
    lora = LoraConfig(
        r=rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(pairs), bias="none",
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: config.alpha for name, own in ranks.items() if own != rank},
    )  # fmt: skip
    lora._register_custom_module(dict.fromkeys(kinds, Linear))
    model.requires_grad_(requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT does not know our layers, but they have what it needs
        inject_adapter_in_model(lora, model)
    found = {}
    for name, pair in pairs.items():
        layer: Any = model.get_submodule(name)
        move_hooks(layer.base_layer, layer)  # the pair reads what the weight reads
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        a.weight = nn.Parameter(pair.a.clone())
        b.weight = nn.Parameter(pair.b / layer.scaling["default"])
        found[name] = (a.weight, b.weight)
    return found


def _schedule(step: int, config: Config) -> float:
    """Factor on the learning rate: linear warm-up, then linear decay to zero."""
    rise = round(config.warmup * config.steps)
    return (step + 1) / rise if step < rise else (config.steps - step) / (config.steps - rise)


def _step(
    model: PreTrainedModel, examples: Sequence[Example], original: Teacher | None, config: Config, seed: int, step: int
) -> float:
    """Add the gradients of one batch; returns its loss, the mean over target tokens."""
    rows = [examples[at] for at in _drawn(step, config.batch, len(examples), seed)]
    count = sum(int(row.loss_mask[1:].sum()) for row in rows)
    total = 0.0
    for start in range(0, len(rows), config.micro):
        own = rows[start : start + config.micro]
        tokens, target = (part.to(model.device) for part in _padded(own))
        with products_in(torch.bfloat16, model.device.type):
            hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
            wanted = target[:, 1:]
            student, labels = hidden[:, :-1][wanted], tokens[:, 1:][wanted]
            taught = None
            if original is not None:
                hidden_states = [original.hidden(row.tokens)[:-1][row.loss_mask[1:].to(model.device)] for row in own]
                taught = logit_slices(original.head, model.config, torch.cat(hidden_states))
            total += loss_gradient(model.get_output_embeddings(), model.config, student, labels, taught, count)
    return total


def drawn(config: Config, rows: int, seed: int) -> list[int]:
    """The rows that training sees."""
    return sorted({at for step in range(config.steps) for at in _drawn(step, config.batch, rows, seed)})


def _drawn(step: int, batch: int, rows: int, seed: int) -> list[int]:
    """The rows of a step: each row once an epoch, in a new random order."""
    places = [divmod(at, rows) for at in range(step * batch, (step + 1) * batch)]
    orders = {}
    for epoch in {epoch for epoch, _ in places}:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        orders[epoch] = torch.randperm(rows, generator=generator).tolist()
    return [orders[epoch][at] for epoch, at in places]


def _padded(rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Rows padded at the end, so that a causal model's earlier tokens do not see the padding."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    target = torch.zeros(len(rows), length, dtype=torch.bool)
    for at, row in enumerate(rows):
        tokens[at, : len(row.tokens)], target[at, : len(row.tokens)] = row.tokens, row.loss_mask
    return tokens, target
