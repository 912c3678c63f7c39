"""Back through the model, block by block, with no more than one block and its gradients in memory.

The forward pass keeps only the input of each block; on the way back each block is run again, with gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from trimbit.errors import NumericsError
from trimbit.jobs.progress import Progress
from trimbit.model.forward.compute import products_in
from trimbit.model.forward.logits import logit_slices
from trimbit.model.forward.stream import BlockStream, Chunks

# losses, each summed over some of a chunk's tokens: the chunk's index, which of its tokens, and their logits
Losses = Callable[[int, slice, Tensor], Sequence[Tensor]]


def inputs_of_blocks(stream: BlockStream, hidden: Chunks, progress: Progress) -> tuple[list[Chunks], Chunks]:
    """What goes into each block, given what goes into the first, and what comes out of the last.

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
    """By chunk, the gradient of each loss at the last hidden states; logits of some tokens at a time."""
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
    """For each gradient of a block's output, that of its input, and those of the tensors that `wanted` names then."""
    x = x.detach().requires_grad_()
    with torch.enable_grad(), products_in(stream.compute, stream.device.type):
        out = stream.forward(index, block, x)
        sources = [x, *wanted()]
    for number, upstream in enumerate(upstreams, start=1):
        with products_in(stream.compute, stream.device.type):
            found = torch.autograd.grad(out, sources, upstream, retain_graph=number < len(upstreams))
        yield found
