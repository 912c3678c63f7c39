"""Gradients of the model's loss with respect to its weights, one block at a time, from the last to the first.

The loss is next-token cross-entropy, the mean over a row of tokens; each row is one sample. The forward pass keeps only
the input of each block; the backward pass runs each block again, with gradients.
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
    """A weight, and over the samples the mean of its gradients (g) and the mean of their squares (fisher)."""

    w: Float[Tensor, "rows cols"]
    g: Float[Tensor, "rows cols"]
    fisher: Float[Tensor, "rows cols"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupled:
    """A weight, and for each of its channels along one axis the member of a dim that it belongs to (-1: none)."""

    gradient: Gradient
    axis: int  # 0: rows, 1: columns
    member: Int[Tensor, " channels"]


def coupled(layout: Layout, unit: Unit, gradients: Mapping[str, Gradient]) -> list[Coupled]:
    """The weights of a unit as its dim couples them: the rows of its writers, the columns of its readers."""
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
    """Yield the index of each block, from the last to the first, with the gradients of its weights by name."""
    layout = stream.layout

    def losses(at: int, part: slice, logits: Tensor) -> list[Tensor]:
        """Next-token cross-entropy; the last token of a row has no label."""
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
