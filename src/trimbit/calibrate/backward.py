"""Backpropagation block by block, with no more than one block and its gradients in memory.

The forward pass keeps only the input of each block; the backward pass runs each block again, with gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from trimbit.errors import NumericsError
from trimbit.jobs.progress import Progress
from trimbit.model.forward.compute import products_in
from trimbit.model.forward.logits import logit_slices
from trimbit.model.forward.stream import BlockStream, Chunks

# (index of a chunk, which of its tokens, their logits) -> losses, each summed over these tokens
Losses = Callable[[int, slice, Tensor], Sequence[Tensor]]


def inputs_of_blocks(stream: BlockStream, hidden: Chunks, progress: Progress) -> tuple[list[Chunks], Chunks]:
    """The inputs of every block and the output of the last, given the input of the first.

    Raises:
        NumericsError: if a block's output is not finite.
    """
    inputs, blocks = [], stream.layout.blocks
    for index in range(blocks):
        block = stream.load(index)
        inputs.append(hidden)
        hidden = [stream.run(index, block, x) for x in hidden]
        if not all(bool(x.isfinite().all()) for x in hidden):
            raise NumericsError(f"the output of block {index} is not finite: the model overflows on this text")
        progress(index + 1, 2 * blocks)
    return inputs, hidden


def loss_gradients(stream: BlockStream, hidden: Chunks, losses: Losses) -> list[list[Tensor]]:
    """For each chunk, the gradient of each loss with respect to the last block's output.

    Logits are made for a slice of the tokens at a time, to save memory.
    """
    head, config, found = stream.head(), stream.layout.config, []
    for at, h in enumerate(hidden):
        h = h.detach().requires_grad_()
        with torch.enable_grad():
            final = stream.norm(h)
        leaf = final.detach().flatten(0, -2).requires_grad_()
        sums: list[Tensor] = []
        with torch.enable_grad(), products_in(stream.compute, stream.device.type):
            for part, logits in logit_slices(head, config, leaf):
                each = losses(at, part, logits)
                sums = sums or [torch.zeros_like(leaf) for _ in each]
                for number, (loss, total) in enumerate(zip(each, sums, strict=True), start=1):
                    total += torch.autograd.grad(loss, leaf, retain_graph=number < len(each))[0]
        found.append([torch.autograd.grad(final, h, own.view_as(final), retain_graph=True)[0] for own in sums])
    return found


def back_through(
    stream: BlockStream, index: int, block: nn.Module, x: Tensor, upstreams: Sequence[Tensor],
    wanted: Callable[[], Iterable[Tensor]],
) -> Iterator[tuple[Tensor, ...]]:  # fmt: skip
    """For each gradient of a block's output, yield the gradients of its input and of the tensors that `wanted` returns.

    `wanted` is called after the block's forward pass.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), products_in(stream.compute, stream.device.type):
        out = stream.forward(index, block, x)
        sources = [x, *wanted()]
    for number, upstream in enumerate(upstreams, start=1):
        with products_in(stream.compute, stream.device.type):
            found = torch.autograd.grad(out, sources, upstream, retain_graph=number < len(upstreams))
        yield found
