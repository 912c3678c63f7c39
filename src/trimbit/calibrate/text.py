"""Token sets for calibration and evaluation, from files.

Nothing here downloads. Files are read as in the published protocols: the lines of a WikiText `.raw` file are the rows
of the data set on the hub, joined by two newlines. Windows do not overlap and hold no special tokens, except a BOS at
the start of each window if the tokenizer adds one by default.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimbit.errors import DataError

SUFFIXES = (".txt", ".md", ".raw", ".jsonl")  # each also with .gz
TEXT_KEYS = ("text", "page", "content")  # a jsonl row's text is under the first of these keys
INSTRUCT_KEYS = ("instruction", "input", "output")  # or under these, joined by newlines


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSet:
    """Rows of tokens, where they come from (`self` or the name of a file), and the seed."""

    name: str
    tokens: Int64[Tensor, "rows length"]
    seed: int

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the shape and the tokens; name and seed do not count."""
        shape = "x".join(map(str, self.tokens.shape))
        data = self.tokens.cpu().contiguous().numpy().astype("<i8").tobytes()
        return hashlib.sha256(f"{shape}:".encode() + data).hexdigest()

    def split(self, *counts: int) -> "tuple[TokenSet, ...]":
        """Split into the first rows, the next ones, and so on; together the parts must be all rows.

        Raises:
            DataError: if the counts do not add up to the number of rows.
        """
        if sum(counts) != len(self.tokens):
            msg = f"{self.name}: parts of {counts} rows were requested, but there are {len(self.tokens)} rows"
            raise DataError(msg)
        return tuple(replace(self, tokens=part) for part in self.tokens.split(list(counts)))

    def pieces(self, length: int) -> "TokenSet":
        """Rows cut into pieces of `length` tokens; the end of a row that is left is unused.

        Raises:
            DataError: if a row is shorter than a piece.
        """
        whole = self.tokens.shape[1] // length * length
        if whole == 0:
            msg = f"{self.name}: pieces of {length} tokens were requested, but the rows have {self.tokens.shape[1]}"
            raise DataError(msg)
        return replace(self, tokens=self.tokens[:, :whole].reshape(-1, length))


def read_text(path: Path) -> str:
    """The text of a `.txt`, `.md`, `.raw` (WikiText) or `.jsonl` file, with or without `.gz`.

    Plain text is used as it is. Each line of a `.raw` file is a row: "" if it is blank, else the line with its newline.
    Rows of `.raw` and `.jsonl` files are joined by two newlines.

    Raises:
        DataError: if the file is missing, of another kind, or not valid UTF-8, gzip or JSON; or a row has no text.
    """
    suffix, text = _decoded(path)
    if suffix == ".raw":
        lines = io.StringIO(text, newline="\n")  # only \n ends a line, not U+2028 or U+0085
        return "\n\n".join(line if line.strip() else "" for line in lines)
    return "\n\n".join(_documents(path, text)) if suffix == ".jsonl" else text


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The line number and content of each row of a `.jsonl` file, with or without `.gz`.

    Raises:
        DataError: if the file is missing, of another kind, or not valid UTF-8, gzip or JSON.
    """
    suffix, text = _decoded(path)
    if suffix != ".jsonl":
        msg = f"{path}: must be a .jsonl file, with or without .gz"
        raise DataError(msg)
    return _rows(path, text)


def _decoded(path: Path) -> tuple[str, str]:
    """The suffix of a file, without `.gz`, and its text."""
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if suffix not in SUFFIXES or not path.is_file():
        problem = "no such file" if suffix in SUFFIXES else f"unknown suffix {path.suffix!r}"
        msg = f"{path}: {problem}; supported are {', '.join(SUFFIXES)}, each also with .gz"
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
            msg = f"{path}, line {number}: found {found or 'no keys'}, but a row needs a string under {known}"
            raise DataError(msg)
        yield document


def _row_text(row: dict[str, Any]) -> str | None:
    """The text of a row, or None if it has none; the `input` of an instruction may be missing or empty."""
    key = next((key for key in TEXT_KEYS if key in row), None)
    if key is None and not {"instruction", "output"} <= row.keys():
        return None
    parts = [row[key]] if key else [row[name] for name in INSTRUCT_KEYS if row.get(name) != ""]
    return "\n".join(parts) if all(isinstance(part, str) for part in parts) else None


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, " n"]:
    """Tokenise a text of any length, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def default_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token if the tokenizer puts it before a text by default, else None."""
    bos: int | None = tokenizer.bos_token_id
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bos if ids and ids[0] == bos else None


def windows(ids: Int[Tensor, " n"], length: int, *, bos: int | None) -> Int[Tensor, "rows length"]:
    """Cut tokens into windows of `length` that do not overlap; leftover tokens at the end are dropped.

    With `bos`, each window is the BOS and `length - 1` tokens.

    Raises:
        DataError: if there are too few tokens for one window.
    """
    body = length - (bos is not None)
    require_positive("window length without BOS", body)
    if len(ids) < body:
        msg = f"the text has {len(ids)} tokens, but one window needs {body}; give more text or use shorter windows"
        raise DataError(msg)
    rows = ids[: len(ids) // body * body].reshape(-1, body)
    return rows if bos is None else torch.cat([rows.new_full((len(rows), 1), bos), rows], dim=1)


def evaluation_windows(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, context: int, max_windows: int | None
) -> Int64[Tensor, "n context"]:
    """The windows of `context` tokens of a file, in order, at most `max_windows` of them (None: all).

    Raises:
        DataError: if the file cannot be read or is shorter than a window, or `max_windows` is below 1.
    """
    if max_windows is not None:
        require_positive("max_windows", max_windows)
    ids = encode(read_text(path), tokenizer)
    try:
        return windows(ids, context, bos=default_bos(tokenizer))[:max_windows]
    except DataError as error:
        msg = f"{path}: {error}"
        raise DataError(msg) from error


def from_file(path: Path, tokenizer: PreTrainedTokenizerBase, *, rows: int, length: int, seed: int) -> TokenSet:
    """Draw `rows` different windows of `length` tokens from a file at random, in the order drawn.

    Raises:
        DataError: if the file cannot be read, or has fewer windows than `rows`.
    """
    ids = encode(read_text(path), tokenizer)
    try:
        found = draw_rows(path.name, ids, tokenizer, rows=rows, length=length, seed=seed)
    except DataError as error:
        msg = f"{path}: {error}"
        raise DataError(msg) from error
    return found


def draw_rows(
    name: str, ids: Int[Tensor, " n"], tokenizer: PreTrainedTokenizerBase, *, rows: int, length: int, seed: int
) -> TokenSet:
    """Draw `rows` different windows of `length` tokens at random, in the order drawn.

    Raises:
        DataError: if there are fewer windows than `rows`.
    """
    require_positive("rows", rows)
    found = windows(ids, length, bos=default_bos(tokenizer))
    if len(found) < rows:
        msg = (
            f"{rows} rows of {length} tokens were requested, but the text has only {len(found)}; "
            f"request at most {len(found)} rows, shorten them or give more text"
        )
        raise DataError(msg)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return TokenSet(name=name, tokens=found[order[:rows]], seed=seed)


def require_positive(what: str, value: int) -> None:
    """Refuse a number below 1.

    Raises:
        DataError: if it is, naming it.
    """
    if value < 1:
        msg = f"{what} is {value}, but must be at least 1"
        raise DataError(msg)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of what decides a tokenizer's output: model and rules, special tokens, chat template."""
    parts = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
