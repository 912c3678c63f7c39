"""The online part of a rotation (QuaRot, arXiv:2404.00456): transforms done while the model runs."""

import hashlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimbit.kernels.hadamard import transform
from trimbit.model.layout import Layout
from trimbit.schema.plan import Rotation


@cache
def _signs(n: int, seed: int, device: torch.device) -> Float[Tensor, " n"]:
    """Random signs, from a hash: written models depend on them, and torch may change its generators."""
    with torch.inference_mode(mode=False), torch.device("cpu"):
        drawn = torch.tensor(list(hashlib.shake_256(str(seed).encode()).digest(n)))
        return (1.0 - 2.0 * (drawn % 2)).to(device)


def turn(x: Float[Tensor, "*batch hidden"], rotation: Rotation) -> Float[Tensor, "*batch hidden"]:
    """The residual stream in the new basis, x Q."""
    return transform(x * _signs(x.shape[-1], rotation.seed, x.device).to(x.dtype))


def turn_back(x: Float[Tensor, "*batch hidden"], rotation: Rotation) -> Float[Tensor, "*batch hidden"]:
    """The residual stream back in the old basis, x Q^T."""
    return transform(x, inverse=True) * _signs(x.shape[-1], rotation.seed, x.device).to(x.dtype)


def go_online(root: nn.Module, layout: Layout, rotation: Rotation, prefix: str = "") -> None:
    """Install the online transforms in a model with folded weights, or in a part of it whose names lack `prefix`.

    Call this before `transform_input`, so that inputs are reordered and rounded after the rotation.
    """
    family, existing = layout.family, dict(root.named_modules())

    def found(name: str) -> nn.Module | None:
        return existing.get(name.removeprefix(prefix)) if name.startswith(prefix) else None

    if embed := found(family.embed):
        embed.register_forward_hook(partial(_give, partial(turn, rotation=rotation)))
    if norm := found(family.final_norm):
        norm.register_forward_pre_hook(partial(_take, partial(turn_back, rotation=rotation)))
    for weight in layout.weights.values():
        if weight.col_axis == "mid" and (last := found(weight.name)):
            last.register_forward_pre_hook(partial(_take, transform))


def _give(change: Callable[[Tensor], Tensor], _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:  # noqa: ANN401
    return change(output)


def _take(change: Callable[[Tensor], Tensor], _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (change(inputs[0]), *inputs[1:])
