"""Text sampled from the model itself."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from trimbit.calibrate.text import TokenSet, _positive, encode
from trimbit.errors import DataError, NumericsError
from trimbit.model.forward.hf_names import CACHE

_SENTINEL = "TRIMBIT-USER-TURN"


def sample_self(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    length: int,
    seed: int,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> TokenSet:
    """Text of the model's own, sampled at temperature 1 from the whole distribution.

    Plain rows start from BOS (EOS if there is none); BOS follows wherever EOS is sampled. With a
    chat template every other row is a chat: the model invents the user's turn, up to
    `length // 4` tokens or its end-of-turn, and answers. All rows of a batch take one token a step,
    the template's or a sampled one, so nothing is padded. The same seed and batch give the same
    tokens on one machine with one thread count. `progress` gets (steps done, steps in all).

    Raises:
        DataError: if a number, the mode of the model or the template does not fit.
        NumericsError: if a logit is not finite.
    """
    _check_sampling(model, rows=rows, length=length, batch=batch)
    states = _start_rows(model, tokenizer, rows, length)
    tokens = torch.empty(rows, length, dtype=torch.int64)
    generator = torch.Generator(model.device).manual_seed(seed)
    total = -(-rows // batch) * length
    for start in range(0, rows, batch):
        part = states[start : start + batch]
        column, past = [row.forced.popleft() for row in part], None
        for step in range(length):
            if step:
                drawn, past = _draw(model, column, past, generator)
                column = [row.take(token) for row, token in zip(part, drawn, strict=True)]
            tokens[start : start + batch, step] = torch.tensor(column)
            if progress:
                progress(start // batch * length + step + 1, total)
    return TokenSet(name="self", tokens=tokens, seed=seed)


@torch.inference_mode()
def _draw(
    model: PreTrainedModel, column: list[int], past: Cache | None, generator: torch.Generator
) -> tuple[list[int], Cache]:
    """Feeds one token a row and draws the next."""
    ids = torch.tensor(column, device=model.device)[:, None]
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: past})
    logits = out.logits[:, -1].float()
    if not logits.isfinite().all():
        bad = int((~logits.isfinite()).sum())
        msg = f"{bad} of {logits.numel()} logits are not finite while sampling; check the weights"
        raise NumericsError(msg)
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    return drawn[:, 0].tolist(), out[CACHE]


@dataclass(slots=True)
class _Row:
    """What a sampled row must take next, and where its chat stands."""

    forced: deque[int]  # come before any sampled token; at least one at the start
    eos: frozenset[int]
    bos: int
    user_left: int | None = None  # tokens left to the user's turn; None outside of it
    answer: tuple[int, ...] = ()  # the template's tokens after the user's turn

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
        _positive(what, value)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and numbers["length"] > most:
        msg = f"rows of {numbers['length']} tokens asked, the model has {most} positions"
        raise DataError(msg)
    if model.training:
        msg = "the model is in training mode; call model.eval() first"
        raise DataError(msg)
