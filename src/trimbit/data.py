"""Token sets for calibration and evaluation, from a file or from the model itself.

Nothing here downloads. Files are read as the published protocols read them: WikiText `.raw` lines
are the hub's rows, joined by two newlines; windows do not overlap and hold no special tokens, but
for the BOS that opens each window where the tokenizer's default adds one.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Int64
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from trimbit.errors import DataError, NumericsError
from trimbit.model.cache_name import CACHE

SUFFIXES = (".txt", ".md", ".raw", ".jsonl")  # each may be followed by .gz
TEXT_KEYS = ("text", "page", "content")  # a jsonl row's text is the first of these
INSTRUCT_KEYS = ("instruction", "input", "output")  # or these, joined by newlines
_SENTINEL = "TRIMBIT-USER-TURN"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSet:
    """Rows of tokens and where they come from: `self` or a file's name, and the seed."""

    name: str
    tokens: Int64[Tensor, "rows length"]
    seed: int

    @property
    def digest(self) -> str:
        """Sha256 (hex) of the shape and the tokens; name and seed do not enter."""
        shape = "x".join(map(str, self.tokens.shape))
        data = self.tokens.cpu().contiguous().numpy().astype("<i8").tobytes()
        return hashlib.sha256(f"{shape}:".encode() + data).hexdigest()

    def split(self, held_out: int) -> "tuple[TokenSet, TokenSet]":
        """The first `rows - held_out` rows and the last `held_out` rows.

        Raises:
            DataError: if either part would be empty.
        """
        rows = len(self.tokens)
        if not 0 < held_out < rows:
            msg = f"{self.name}: cannot hold out {held_out} of {rows} rows"
            raise DataError(msg)
        first, last = self.tokens[:-held_out], self.tokens[-held_out:]
        return replace(self, tokens=first), replace(self, tokens=last)


def read_text(path: Path) -> str:
    """The text of a `.txt`, `.md`, `.raw` (WikiText) or `.jsonl` file, with or without `.gz`.

    Plain text is used as it is. Lines of `.raw` become rows: "" if blank, else the line with its
    newline. Rows, as the documents of a `.jsonl`, are joined by two newlines.

    Raises:
        DataError: if the file is missing, of another kind, or not valid utf-8, gzip or JSON.
    """
    suffix, text = _decoded(path)
    if suffix == ".raw":
        lines = io.StringIO(text, newline="\n")  # only \n ends a line, not U+2028 or U+0085
        return "\n\n".join(line if line.strip() else "" for line in lines)
    return "\n\n".join(_documents(path, text)) if suffix == ".jsonl" else text


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a `.jsonl` file, with or without `.gz`, and their line numbers.

    Raises:
        DataError: if the file is missing, of another kind, or not valid utf-8, gzip or JSON.
    """
    suffix, text = _decoded(path)
    if suffix != ".jsonl":
        msg = f"{path}: a .jsonl file is needed, with or without .gz"
        raise DataError(msg)
    return _rows(path, text)


def _decoded(path: Path) -> tuple[str, str]:
    """A file's suffix, without `.gz`, and its text."""
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if suffix not in SUFFIXES or not path.is_file():
        problem = "no such file" if suffix in SUFFIXES else f"unknown suffix {path.suffix!r}"
        msg = f"{path}: {problem}; known are {', '.join(SUFFIXES)}, each also with .gz"
        raise DataError(msg)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read as utf-8 text{' in gzip' * (path.suffix == '.gz')}: {error}"
        raise DataError(msg) from error
    return suffix, text


def _rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            msg = f"{path}, line {number}: not valid JSON: {error}"
            raise DataError(msg) from error


def _documents(path: Path, text: str) -> Iterator[str]:
    for number, row in _rows(path, text):
        document = _row_text(row) if isinstance(row, dict) else None
        if document is None:
            found = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            known = f"{', '.join(TEXT_KEYS)}, or {' + '.join(INSTRUCT_KEYS)}"
            msg = f"{path}, line {number}: found {found or 'no keys'}; needs a string in {known}"
            raise DataError(msg)
        yield document


def _row_text(row: dict[str, Any]) -> str | None:
    """A row's text, or None; an instruction's `input` may be missing or empty."""
    key = next((key for key in TEXT_KEYS if key in row), None)
    if key is None and not {"instruction", "output"} <= row.keys():
        return None
    parts = [row[key]] if key else [row[name] for name in INSTRUCT_KEYS if row.get(name) != ""]
    return "\n".join(parts) if all(isinstance(part, str) for part in parts) else None


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, " n"]:
    """The tokens of a text of any length, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def default_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token, if this tokenizer puts it before a text by default; else None."""
    bos: int | None = tokenizer.bos_token_id
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bos if ids and ids[0] == bos else None


def windows(ids: Int[Tensor, " n"], length: int, *, bos: int | None) -> Int[Tensor, "rows length"]:
    """Cuts tokens into windows of `length` that do not overlap; what remains at the end is dropped.

    With a BOS each window is the BOS and `length - 1` tokens.

    Raises:
        DataError: if there are too few tokens for one window.
    """
    body = length - (bos is not None)
    _positive("window length without BOS", body)
    if len(ids) < body:
        msg = f"{len(ids)} tokens found, {body} needed for one window; give more text"
        raise DataError(msg)
    rows = ids[: len(ids) // body * body].reshape(-1, body)
    return rows if bos is None else torch.cat([rows.new_full((len(rows), 1), bos), rows], dim=1)


def evaluation_windows(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, context: int, limit: int | None
) -> Int64[Tensor, "n context"]:
    """A file's windows of `context` tokens, in order from its start, at most `limit` of them.

    Raises:
        DataError: if the file cannot be read or is shorter than a window, or `limit` is below 1.
    """
    if limit is not None:
        _positive("limit", limit)
    ids = encode(read_text(path), tokenizer)
    try:
        return windows(ids, context, bos=default_bos(tokenizer))[:limit]
    except DataError as error:
        msg = f"{path}: {error}"
        raise DataError(msg) from error


def from_file(path: Path, tokenizer: PreTrainedTokenizerBase, *, rows: int, length: int, seed: int) -> TokenSet:
    """Draws `rows` different windows of `length` tokens from a file, in the order drawn.

    Raises:
        DataError: if the file cannot be read, or has fewer windows than `rows`.
    """
    _positive("rows", rows)
    found = evaluation_windows(path, tokenizer, context=length, limit=None)
    if len(found) < rows:
        msg = (
            f"{path}: {rows} rows of {length} tokens asked, the text has {len(found)}; "
            f"ask for at most {len(found)} rows, shorten them or give more text"
        )
        raise DataError(msg)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return TokenSet(name=path.name, tokens=found[order[:rows]], seed=seed)


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


def _positive(what: str, value: int) -> None:
    if value < 1:
        msg = f"{what} is {value}; must be at least 1"
        raise DataError(msg)
