"""The original model's last hidden states for rows of tokens, kept on disk, and its head.

They are computed block by block, so that the whole original is never in memory together with a model that is compared
with it. Whatever is compared on the same rows next reuses them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimbit.errors import ArtifactError
from trimbit.jobs.checked import load_tensors, save_tensors
from trimbit.jobs.progress import Progress
from trimbit.model.forward.logits import Head, head_of
from trimbit.model.forward.stream import CPU, BlockStream
from trimbit.schema.base import digest


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The original on some rows: the input of its head for a row of tokens, and the weight of the head."""

    hidden: Callable[[Int[Tensor, " length"]], Float[Tensor, "length hidden"]]
    weight: Float[Tensor, "vocab hidden"]

    @cached_property
    def head(self) -> Head:
        """The head."""
        return head_of(self.weight)

    def to(self, device: torch.device) -> "Teacher":
        """The same teacher, whose outputs are on another device."""
        return Teacher(hidden=lambda tokens: self.hidden(tokens).to(device), weight=self.weight.to(device))


CARRIED = 2**28  # most bytes of fp32 hidden states that one sweep over the blocks carries


def teacher_outputs(stream: BlockStream, rows: Iterable[Tensor], folder: Path, progress: Progress) -> Teacher:
    """The original as the teacher for `rows`; rows missing from `folder` are computed one by one.

    No row's result depends on the others. A row takes length * hidden elements of the stream's dtype in `folder`.
    """

    def place(tokens: Tensor) -> Path:
        return folder / f"{digest(tokens.tolist())}.safetensors"

    missing = {path: tokens for tokens in rows if load_tensors(path := place(tokens)) is None}
    groups = _groups(missing, 4 * stream.layout.sizes["hidden"])
    for number, group in enumerate(groups):
        hidden = [stream.embed(missing[path][None]) for path in group]
        for index in range(stream.layout.blocks):
            block = stream.load(index).to(stream.compute)
            hidden = [stream.run(index, block, row) for row in hidden]
            progress(number * stream.layout.blocks + index + 1, len(groups) * stream.layout.blocks)
        for path, last in zip(group, hidden, strict=True):
            save_tensors(path, {"hidden": stream.final_norm(last)[0].to(stream.compute).cpu()})

    def hidden_of(tokens: Tensor) -> Tensor:
        found = load_tensors(place(tokens))
        if found is None:
            raise ArtifactError(f"{place(tokens)} is missing or was damaged during the run; run again")
        return found[0]["hidden"].to(stream.compute)

    return Teacher(hidden=hidden_of, weight=stream.head_weight(CPU))


def _groups(rows: Mapping[Path, Tensor], token_nbytes: int) -> list[list[Path]]:
    """Split rows, in order, into groups whose hidden states take at most `CARRIED` bytes; a longer row is a group."""
    groups: list[list[Path]] = []
    carried = CARRIED
    for path, tokens in rows.items():
        carried += len(tokens) * token_nbytes
        if carried > CARRIED:
            groups.append([])
            carried = len(tokens) * token_nbytes
        groups[-1].append(path)
    return groups
