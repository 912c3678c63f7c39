"""Calibration text sampled from the model itself."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from trimbit.calibrate.roomy_cache import roomy_cache
from trimbit.calibrate.text import TokenSet, encode, require_positive
from trimbit.errors import DataError, NumericsError
from trimbit.jobs.checked import load_tensors, save_tensors
from trimbit.model.forward.attention import grouped
from trimbit.model.forward.hf_names import CACHE

NAME = "self"
BATCH = 32  # rows sampled together
SEGMENT = 512  # tokens of a row, at least: an interrupted run loses at most a segment
SEGMENTS = 2  # of a row, at most: each starts by reading the tokens before it again
PREFILL_TOKENS = 64  # tokens of a row that are read together
_SENTINEL = "TRIMBIT-USER-TURN"


def sample_self(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rows: int, length: int, seed: int,
    batch: int = BATCH, progress: Callable[[int, int], None] | None = None, folder: Path | None = None,
) -> TokenSet:  # fmt: skip
    """Sample text from the model, at temperature 1 and from the full distribution.

    Plain rows start with BOS (or EOS if there is no BOS); BOS follows wherever EOS is sampled. With a chat template,
    every other row is a chat: the model writes the user's turn, up to `length // 4` tokens or its end-of-turn token,
    and then the answer. All rows of a batch take one token per step, the template's or a sampled one: no padding.

    A batch is sampled in segments. Each starts by reading the tokens so far and has its own random generator, so that
    an interrupted run resumes after the last segment in `folder` and ends with the same tokens. The same seed and batch
    give the same tokens on one machine with one thread count. `progress` takes (steps done, all steps).

    Raises:
        DataError: if a number is out of range, the model is in training mode, the tokenizer has neither BOS nor EOS,
            or its chat template cannot be used.
        NumericsError: if a logit is not finite.
    """
    _check_sampling(model, rows=rows, length=length, batch=batch)
    states = _start_rows(model, tokenizer, rows, length)
    tokens, done = torch.zeros(rows, length, dtype=torch.int64), 0
    path = folder / "sampled.safetensors" if folder is not None else None
    if path is not None and (known := load_tensors(path)) is not None:
        tokens, done = known[0]["tokens"], int(known[1]["segments"])
        states = [_Row.from_json(one, old) for one, old in zip(json.loads(known[1]["rows"]), states, strict=True)]
    step = segment_tokens(length)
    work = [(first, start) for first in range(0, rows, batch) for start in range(0, length, step)]
    for at, (first, start) in enumerate(work[done:], start=done):
        own = slice(first, min(first + batch, rows))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + at)

        def report(steps: int, before: int = (first // batch) * length + start) -> None:
            if progress is not None:
                progress(before + steps, -(-rows // batch) * length)

        with grouped(model):
            _segment(model, states[own], tokens[own], start, min(start + step, length), generator, report)
        if path is not None:
            rest = {"segments": str(at + 1), "rows": json.dumps([row.to_json() for row in states])}
            save_tensors(path, {"tokens": tokens}, rest)
    if path is not None:
        path.unlink()
    return TokenSet(name=NAME, tokens=tokens, seed=seed)


def segment_tokens(length: int) -> int:
    """The tokens of each segment of a row but the last."""
    return max(-(-length // SEGMENTS), SEGMENT)


def _segment(
    model: PreTrainedModel, states: "Sequence[_Row]", tokens: Int64[Tensor, "rows length"], start: int, stop: int,
    generator: torch.Generator, progress: Callable[[int], None],
) -> None:  # fmt: skip
    """Fill the columns of `tokens` from `start` up to `stop`."""
    past = read(model, tokens[:, : start - 1]) if start > 1 else roomy_cache()
    for column in range(start, stop):
        if column == 0:
            tokens[:, 0] = torch.tensor([row.forced.popleft() for row in states])
        else:
            drawn = draw(model, tokens[:, column - 1], past, generator)
            tokens[:, column] = torch.tensor([row.take(token) for row, token in zip(states, drawn, strict=True)])
        progress(column - start + 1)


@torch.inference_mode()
def read(model: PreTrainedModel, tokens: Int64[Tensor, "rows length"]) -> Cache:
    """The KV cache after these tokens."""
    past = roomy_cache()
    for part in tokens.split(PREFILL_TOKENS, dim=1):
        model(input_ids=part.to(model.device), use_cache=True, logits_to_keep=1, **{CACHE: past})
    return past


@torch.inference_mode()
def draw(model: PreTrainedModel, column: Int64[Tensor, " rows"], past: Cache, generator: torch.Generator) -> list[int]:
    """Feed one token per row, add it to the KV cache, and draw the next."""
    ids = column.to(model.device)[:, None]
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: past})
    logits = out.logits[:, -1].float()
    if not logits.isfinite().all():
        bad = int((~logits.isfinite()).sum())
        msg = f"{bad} of {logits.numel()} logits are not finite while sampling; check the weights"
        raise NumericsError(msg)
    below = logits.softmax(-1).cumsum(-1)  # so one random number per row is enough, not one per vocabulary entry
    point = torch.rand(len(below), 1, generator=generator).to(below.device) * below[:, -1:]
    drawn = torch.searchsorted(below, point, right=True).clamp_(max=below.shape[1] - 1)
    tokens: list[int] = drawn[:, 0].tolist()
    return tokens


@dataclass(slots=True)
class _Row:
    """The state of a sampled row: which tokens it must take next, and where its chat stands."""

    forced: deque[int]  # tokens to take before any sampled one; at least one at the start
    eos: frozenset[int]
    bos: int
    user_left: int | None = None  # tokens left in the user's turn; None outside it
    answer: tuple[int, ...] = ()  # the template's tokens after the user's turn

    def to_json(self) -> list[object]:
        """The part of the state that changes while the row is sampled."""
        return [list(self.forced), self.user_left]

    @classmethod
    def from_json(cls, value: list[Any], start: "_Row") -> "_Row":
        """A stored row; what does not change is taken from `start`."""
        return cls(deque(value[0]), start.eos, start.bos, value[1], start.answer)

    def take(self, sampled: int) -> int:
        """The next token: a forced one, or else the sampled one or what must replace it."""
        if self.forced:
            return self.forced.popleft()
        if self.user_left is not None:
            if self.user_left and sampled not in self.eos and sampled != self.answer[0]:
                self.user_left -= 1
                return sampled
            self.user_left = None
            self.forced.extend(self.answer)
            return self.forced.popleft()
        if sampled in self.eos and self.bos not in self.eos:
            self.forced.append(self.bos)
        return sampled


def _start_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> list[_Row]:
    """Plain rows and chats in turn, so that any part of the rows holds both; without a chat template, plain rows."""
    config = model.generation_config
    ends = config.eos_token_id if config and config.eos_token_id is not None else []
    eos = frozenset([ends] if isinstance(ends, int) else ends) | {tokenizer.eos_token_id} - {None}
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos is None:
        msg = "the tokenizer has neither BOS nor EOS to start a text; calibrate on a text file (--calibration FILE)"
        raise DataError(msg)
    chats = rows // 2 if tokenizer.chat_template else 0
    before, answer = _template(tokenizer, length) if chats else ([], [])
    return [
        _Row(deque(before), eos, bos, length // 4, tuple(answer)) if chats and at % 2 else _Row(deque([bos]), eos, bos)
        for at in range(rows)
    ]


def _template(tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[list[int], list[int]]:
    """The chat template's tokens before the user's words, and after them up to the answer."""
    user = [{"role": "user", "content": _SENTINEL}]
    text = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    before, *after = [encode(part, tokenizer).tolist() for part in str(text).split(_SENTINEL)]
    if len(after) != 1 or not before or not after[0]:
        msg = (
            "the chat template must contain the user's message once, with tokens before and after it, but it gave "
            f"{text!r}; calibrate on a text file (--calibration FILE)"
        )
        raise DataError(msg)
    needed = len(before) + length // 4 + len(after[0]) + 1
    if needed > length:
        msg = f"a chat needs at least {needed} tokens, but rows have {length}; use longer rows (calibration.length)"
        raise DataError(msg)
    return before, after[0]


def _check_sampling(model: PreTrainedModel, **numbers: int) -> None:
    for what, value in numbers.items():
        require_positive(what, value)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and numbers["length"] > most:
        msg = (
            f"rows of {numbers['length']} tokens were requested, but the model has only {most} positions; use shorter "
            "rows (calibration.length)"
        )
        raise DataError(msg)
    if model.training:
        msg = "the model is in training mode; call model.eval() first"
        raise DataError(msg)
