"""Text sampled from the model itself."""

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

from trimbit.calibrate.text import TokenSet, encode, require_positive
from trimbit.errors import DataError, NumericsError
from trimbit.jobs.checked import load_tensors, save_tensors
from trimbit.model.forward.attention import grouped
from trimbit.model.forward.hf_names import CACHE

BATCH = 32  # rows that are sampled together
SEGMENTS = 2  # of each row: an interrupted run loses no more than one, but each begins by reading the row again
PREFILL_TOKENS = 64  # of a row, read together
_SENTINEL = "TRIMBIT-USER-TURN"


def sample_self(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rows: int, length: int, seed: int,
    batch: int = BATCH, progress: Callable[[int, int], None] | None = None, folder: Path | None = None,
) -> TokenSet:  # fmt: skip
    """Text of the model's own, sampled at temperature 1 from the whole distribution.

    Plain rows start from BOS (EOS if there is none); BOS follows wherever EOS is sampled. With a chat template every
    other row is a chat: the model invents the user's turn, up to `length // 4` tokens or its end-of-turn, and answers.
    All rows of a batch take one token a step, the template's or a sampled one, so nothing is padded.

    A batch is sampled in segments. Each begins by reading the tokens so far and has a generator of its own, so that a
    run that was interrupted goes on from the last segment in `folder` and ends with the same tokens. The same seed and
    batch give the same tokens on one machine with one thread count. `progress` gets (steps done, steps in all).

    Raises:
        DataError: if a number, the mode of the model or the template does not fit.
        NumericsError: if a logit is not finite.
    """
    _check_sampling(model, rows=rows, length=length, batch=batch)
    states = _start_rows(model, tokenizer, rows, length)
    tokens, done = torch.zeros(rows, length, dtype=torch.int64), 0
    path = folder / "sampled.safetensors" if folder is not None else None
    if path is not None and (known := load_tensors(path)) is not None:
        tokens, done = known[0]["tokens"], int(known[1]["segments"])
        states = [_Row.from_json(one, old) for one, old in zip(json.loads(known[1]["rows"]), states, strict=True)]
    step = -(-length // SEGMENTS)
    work = [(first, start) for first in range(0, rows, batch) for start in range(0, length, step)]
    for at, (first, start) in enumerate(work[done:], start=done):
        own = slice(first, min(first + batch, rows))
        generator = torch.Generator(model.device).manual_seed(seed * 1_000_003 + at)

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
    return TokenSet(name="self", tokens=tokens, seed=seed)


def _segment(
    model: PreTrainedModel, states: "Sequence[_Row]", tokens: Int64[Tensor, "rows length"], start: int, stop: int,
    generator: torch.Generator, progress: Callable[[int], None],
) -> None:  # fmt: skip
    """Fill the columns from `start` to `stop`."""
    past = read(model, tokens[:, : start - 1]) if start > 1 else None
    for column in range(start, stop):
        if column == 0:
            tokens[:, 0] = torch.tensor([row.forced.popleft() for row in states])
        else:
            drawn, past = draw(model, tokens[:, column - 1], past, generator)
            tokens[:, column] = torch.tensor([row.take(token) for row, token in zip(states, drawn, strict=True)])
        progress(column - start + 1)


@torch.inference_mode()
def read(model: PreTrainedModel, tokens: Int64[Tensor, "rows length"]) -> Cache:
    """The cache of keys and values after some tokens."""
    past: Cache | None = None
    for part in tokens.split(PREFILL_TOKENS, dim=1):
        past = model(input_ids=part.to(model.device), use_cache=True, logits_to_keep=1, **{CACHE: past})[CACHE]
    assert past is not None
    return past


@torch.inference_mode()
def draw(
    model: PreTrainedModel, column: Int64[Tensor, " rows"], past: Cache | None, generator: torch.Generator
) -> tuple[list[int], Cache]:
    """Feeds one token a row and draws the next."""
    ids = column.to(model.device)[:, None]
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: past})
    logits = out.logits[:, -1].float()
    if not logits.isfinite().all():
        bad = int((~logits.isfinite()).sum())
        msg = f"{bad} of {logits.numel()} logits are not finite while sampling; check the weights"
        raise NumericsError(msg)
    below = logits.softmax(-1).cumsum(-1)  # one number a row in place of one a token of the vocabulary
    point = torch.rand(len(below), 1, generator=generator, device=below.device) * below[:, -1:]
    drawn = torch.searchsorted(below, point, right=True).clamp_(max=below.shape[1] - 1)
    return drawn[:, 0].tolist(), out[CACHE]


@dataclass(slots=True)
class _Row:
    """What a sampled row must take next, and where its chat stands."""

    forced: deque[int]  # come before any sampled token; at least one at the start
    eos: frozenset[int]
    bos: int
    user_left: int | None = None  # tokens left to the user's turn; None outside of it
    answer: tuple[int, ...] = ()  # the template's tokens after the user's turn

    def to_json(self) -> list[object]:
        """What changes while the row is sampled."""
        return [list(self.forced), self.user_left]

    @classmethod
    def from_json(cls, value: list[Any], start: "_Row") -> "_Row":
        """A row that was stored; the rest is as it was at the start."""
        return cls(deque(value[0]), start.eos, start.bos, value[1], start.answer)

    def take(self, sampled: int) -> int:
        """The next token: a forced one, else the sampled one or what must stand in its place."""
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
    """A plain row, a chat, a plain row and so on, so that any part of the rows holds both."""
    config = model.generation_config
    ends = config.eos_token_id if config and config.eos_token_id is not None else []
    eos = frozenset([ends] if isinstance(ends, int) else ends) | {tokenizer.eos_token_id} - {None}
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos is None:
        msg = "the tokenizer has neither BOS nor EOS to start a text with; calibrate with a file"
        raise DataError(msg)
    chats = rows // 2 if tokenizer.chat_template else 0
    before, answer = _template(tokenizer, length) if chats else ([], [])
    return [
        _Row(deque(before), eos, bos, length // 4, tuple(answer)) if chats and at % 2 else _Row(deque([bos]), eos, bos)
        for at in range(rows)
    ]


def _template(tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[list[int], list[int]]:
    """The chat template's tokens before and after the user's words, up to the answer."""
    user = [{"role": "user", "content": _SENTINEL}]
    text = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    before, *after = [encode(part, tokenizer).tolist() for part in str(text).split(_SENTINEL)]
    if len(after) != 1 or not before or not after[0]:
        msg = f"the chat template must hold a user's words once, between tokens; it made {text!r}"
        raise DataError(msg)
    needed = len(before) + length // 4 + len(after[0]) + 1
    if needed > length:
        msg = f"a chat takes {needed} tokens or more, rows have {length}; make the rows longer"
        raise DataError(msg)
    return before, after[0]


def _check_sampling(model: PreTrainedModel, **numbers: int) -> None:
    for what, value in numbers.items():
        require_positive(what, value)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and numbers["length"] > most:
        msg = f"rows of {numbers['length']} tokens asked, the model has {most} positions"
        raise DataError(msg)
    if model.training:
        msg = "the model is in training mode; call model.eval() first"
        raise DataError(msg)
