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

from trimbit.jobs.progress import Progress
from trimbit.model import axes
from trimbit.model.forward.compute import products_in
from trimbit.model.forward.logits import logit_slices
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
    hidden = [stream.embed(row[None]) for row in tokens]
    inputs = []
    for index in range(layout.blocks):
        block = stream.load(index)
        inputs.append(hidden)
        hidden = [stream.run(index, block, x) for x in hidden]
        progress(index + 1, 2 * layout.blocks)
    upstream = _loss_gradients(stream, hidden, tokens)
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
            x = x.detach().requires_grad_()
            with torch.enable_grad(), products_in(stream.compute):
                out = stream.forward(index, block, x)
                grads = torch.autograd.grad(out, [x, *weights.values()], upstream[at])
            upstream[at] = grads[0]
            for one, grad in zip(found.values(), grads[1:], strict=True):
                one.g.add_(grad, alpha=1 / len(tokens))
                one.fisher.add_(grad.square_(), alpha=1 / len(tokens))
        progress(2 * layout.blocks - index, 2 * layout.blocks)
        yield index, found


def _loss_gradients(stream: BlockStream, hidden: list[Tensor], tokens: Tensor) -> list[Tensor]:
    """dL/dh of each sample's last hidden states; logits some tokens at a time."""
    head, config, found = stream.head(), stream.layout.config, []
    for row, h in zip(tokens, hidden, strict=True):
        h = h.detach().requires_grad_()
        with torch.enable_grad():
            final = stream.norm(h).flatten(0, -2)
        leaf = final.detach()[:-1].requires_grad_()
        with torch.enable_grad(), products_in(stream.compute):
            for part, logits in logit_slices(head, config, leaf):
                loss = functional.cross_entropy(logits, row[1:][part], reduction="sum") / (len(row) - 1)
                loss.backward()
        assert leaf.grad is not None
        last = torch.zeros_like(final[-1:])
        found.append(torch.autograd.grad(final, h, torch.cat([leaf.grad, last]))[0])
    return found
