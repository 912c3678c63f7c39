"""Training examples of recovery: instructions with the prompt masked, or plain rows of tokens."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from trimbit.calibrate.text import default_bos, encode, read_rows
from trimbit.errors import DataError
from trimbit.recover.tune import Example

# code (horseee/LLM-Pruner, after tatsu-lab/stanford_alpaca)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def from_instructions(path: Path, tokenizer: Any, length: int, *, masked: bool) -> list[Example]:  # noqa: ANN401
    """Rows of `instruction`, `input` and `output`, at most `length` tokens each.

    With `masked`, only the output and its EOS are to be predicted; else all tokens but the first, as in distillation.
    Rows whose prompt alone fills the length are left out.

    Raises:
        DataError: if the file cannot be read, a row lacks a field, no row is left, or the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no EOS to end an output with")
    found, start = [], _start(tokenizer)
    for number, row in read_rows(path):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("instruction", "output")):
            raise DataError(f"{path}, line {number}: needs `instruction` and `output`, and may have `input`")
        prompt = (WITH_INPUT if row.get("input") else WITHOUT_INPUT).format_map(row)
        before = torch.cat([start, encode(prompt, tokenizer)])
        after = torch.cat([encode(row["output"], tokenizer), torch.tensor([tokenizer.eos_token_id])])
        tokens = torch.cat([before, after])[:length]
        if len(tokens) > len(before):
            target = torch.arange(len(tokens)) >= (len(before) if masked else 1)
            found.append(Example(tokens=tokens, loss_mask=target))
    if not found:
        raise DataError(f"{path}: no row has a prompt below {length} tokens and an output; make tune.length larger")
    return found


def from_rows(tokens: Int[Tensor, "rows _"], tokenizer: Any, length: int) -> list[Example]:  # noqa: ANN401
    """Plain rows cut into pieces of at most `length`; all but the first token of each are predicted."""
    start = _start(tokenizer)
    body = tokens[:, len(start) :]
    step = min(length - len(start), body.shape[1])
    cut = body[:, : body.shape[1] // step * step].reshape(-1, step)
    pieces = torch.cat([start.expand(len(cut), -1), cut], dim=1)
    return [Example(tokens=piece, loss_mask=torch.arange(len(piece)) > 0) for piece in pieces]


def _start(tokenizer: Any) -> Tensor:  # noqa: ANN401
    """The BOS, if this tokenizer puts it before a text by default."""
    bos = default_bos(tokenizer)
    return torch.tensor([] if bos is None else [bos], dtype=torch.long)
