"""Blocks as CUDA graphs: one launch each, instead of hundreds of small operations that wait for Python one by one."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Block = Callable[..., Tensor]  # takes the residual stream and the masks of the block's sites


def recorded(blocks: Sequence[Block], hidden: Tensor, masks: Sequence[Sequence[Tensor]]) -> Sequence[Block]:
    """Record blocks, to be run in this order on tensors of these shapes; gradients pass to all but the first `hidden`.

    The activations kept for gradients, and the gradients, use the same memory in each run.
    """
    samples = (
        (torch.zeros_like(hidden, requires_grad=at > 0), *(torch.zeros_like(own, requires_grad=True) for own in each))
        for at, each in enumerate(masks)
    )
    with warnings.catch_warnings():  # PyTorch's own: it warms up on one stream and records on another
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        made: Any = torch.cuda.make_graphed_callables(tuple(blocks), tuple(samples))
    return tuple(made)


def replay(blocks: Sequence[Block], hidden: Tensor, masks: Sequence[Sequence[Tensor]], seed: int) -> Tensor:
    """Run recorded blocks one after the other, with noise from a seed; the GPU's random state is left unchanged."""
    with torch.random.fork_rng([hidden.device]):
        torch.cuda.manual_seed(seed)
        for run, own in zip(blocks, masks, strict=True):
            hidden = run(hidden, *own)
    return hidden


def noise(like: Tensor, seed: int) -> Tensor:
    """Normal numbers from a seed; in a recorded block, each replay draws its next numbers from the GPU's generator."""
    generator = None
    if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
