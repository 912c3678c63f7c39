"""Blocks as CUDA graphs: each is one launch, where hundreds of small operations would wait for Python one by one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Block = Callable[..., Tensor]  # of the residual stream and the masks of the block's sites


def recorded(blocks: Sequence[Block], hidden: Tensor, masks: Sequence[Sequence[Tensor]]) -> Sequence[Block]:
    """The blocks, to be run in this order on tensors of these shapes; gradients pass to all but the first `hidden`.

    All that is kept for the gradients stays where it is from one run to the next. Noise is PyTorch's own on the GPU
    (`noise`).
    """
    samples = (
        (torch.zeros_like(hidden, requires_grad=at > 0), *(torch.zeros_like(own, requires_grad=True) for own in each))
        for at, each in enumerate(masks)
    )
    made: tuple[Block, ...] = torch.cuda.make_graphed_callables(tuple(blocks), tuple(samples))  # type: ignore[assignment]
    return made


def noise(like: Tensor, seed: int) -> Tensor:
    """Normal numbers by a seed; while a block is recorded, those that come next where it is replayed."""
    generator = None
    if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
