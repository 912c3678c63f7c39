"""Gradients of the model's own loss on its weights, block by block from the last: no more than one block's at a time.

The loss is next-token cross-entropy, the mean over a row of tokens; a sample is a row. The forward pass keeps the
input of each block alone; a block is run again, with gradients, when its turn comes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from trimbit.calibrate.backward import back_through, inputs_of_blocks, loss_gradients
from trimbit.jobs.progress import Progress
from trimbit.model import axes
from trimbit.model.forward.logits import NOTHING
from trimbit.model.forward.stream import BlockStream
from trimbit.model.layout import Layout, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """A weight and the gradients of the loss: g, the mean over samples, and fisher, the mean of their squares."""

    w: Float[Tensor, "rows cols"]
    g: Float[Tensor, "rows cols"]
    fisher: Float[Tensor, "rows cols"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupled:
    """A weight, and the member of a dim that each of its channels along one axis belongs to (-1: none)."""

    gradient: Gradient
    axis: int  # 0: rows, 1: columns
    member: Int[Tensor, " channels"]


def coupled(layout: Layout, unit: Unit, gradients: Mapping[str, Gradient]) -> list[Coupled]:
    """The weights of a unit as its dim sees them: rows of those that write into it, columns of what reads it."""
    assert unit.dim is not None
    factor = unit.dim.rsplit(".", 1)[1]
    return [
        Coupled(gradient=gradients[name], axis=axis, member=axes.members(pattern, layout.sizes, factor))
        for name in unit.weights
        for axis, pattern in enumerate((layout.weights[name].row_axis, layout.weights[name].col_axis))
        if axes.mentions(pattern, factor)
    ]


def sweep(
    stream: BlockStream, tokens: Int[Tensor, "samples length"], progress: Progress
) -> Iterator[tuple[int, dict[str, Gradient]]]:
    """Blocks from the last to the first, with the gradients of their weights by name."""
    layout = stream.layout

    def losses(at: int, part: slice, logits: Tensor) -> list[Tensor]:
        """Next-token cross-entropy; nothing follows the last token."""
        follows = functional.pad(tokens[at, 1:], (0, 1), value=NOTHING)[part].to(logits.device)
        total = functional.cross_entropy(logits, follows, reduction="sum", ignore_index=NOTHING)
        return [total / (tokens.shape[1] - 1)]

    inputs, hidden = inputs_of_blocks(stream, [stream.embed(row[None]) for row in tokens], progress)
    upstream = [own for (own,) in loss_gradients(stream, hidden, losses)]
    for index in reversed(range(layout.blocks)):
        prefix = f"{layout.family.blocks}.{index}."
        block = stream.load(index).requires_grad_(requires_grad=False)
        weights = {
            name: block.get_parameter(f"{name.removeprefix(prefix)}.weight")
            for name in layout.weights
            if name.startswith(prefix)
        }
        found = {
            name: Gradient(w=w.detach(), g=torch.zeros_like(w), fisher=torch.zeros_like(w))
            for name, w in weights.items()
        }
        for w in weights.values():
            w.requires_grad_()
        for at, x in enumerate(inputs.pop()):
            ((upstream[at], *grads),) = back_through(stream, index, block, x, [upstream[at]], weights.values)
            for one, grad in zip(found.values(), grads, strict=True):
                one.g.add_(grad, alpha=1 / len(tokens))
                one.fisher.add_(grad.square_(), alpha=1 / len(tokens))
        progress(2 * layout.blocks - index, 2 * layout.blocks)
        yield index, found
