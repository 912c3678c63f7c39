"""What recovery trains on: instructions with the prompt masked, or plain rows of tokens."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from trimbit.data import encode, read_rows
from trimbit.errors import DataError
from trimbit.repair.tune import Example

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


def from_instructions(path: Path, tokenizer: Any, length: int) -> list[Example]:  # noqa: ANN401
    """Rows of `instruction`, `input` and `output`, at most `length` tokens each; the output and its end are predicted.

    Rows whose prompt alone fills the length are left out.

    Raises:
        DataError: if the file cannot be read, a row lacks a field, or no row is left.
    """
    found = []
    for number, row in read_rows(path):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("instruction", "output")):
            raise DataError(f"{path}, line {number}: needs `instruction` and `output`, and may have `input`")
        prompt = (WITH_INPUT if row.get("input") else WITHOUT_INPUT).format_map(row)
        before = encode(prompt, tokenizer)
        after = torch.cat([encode(row["output"], tokenizer), torch.tensor([tokenizer.eos_token_id])])
        tokens = torch.cat([before, after])[:length]
        if len(tokens) > len(before):
            target = torch.arange(len(tokens)) >= len(before)
            found.append(Example(tokens=tokens, target=target))
    if not found:
        raise DataError(f"{path}: no row has a prompt below {length} tokens and an output; make tune.length larger")
    return found


def from_rows(tokens: Int[Tensor, "rows length"], length: int) -> list[Example]:
    """Plain rows cut into pieces of `length`; all but the first token of each are predicted."""
    pieces = tokens[:, : tokens.shape[1] // length * length].reshape(-1, min(length, tokens.shape[1]))
    return [Example(tokens=piece, target=torch.arange(len(piece)) > 0) for piece in pieces]
