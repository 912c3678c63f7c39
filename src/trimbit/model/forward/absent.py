"""Replacements for dropped sub-blocks."""

from typing import Any

import torch
from torch import Tensor, nn

from trimbit.model.forward.hf_names import CACHE
from trimbit.model.layout import Unit


class NoAttention(nn.Module):
    """Replaces dropped attention: adds zero, but keeps the token count of the KV cache correct."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:  # noqa: ANN401
        """Zero."""
        cache = kwargs.get(CACHE)
        if cache is not None:
            empty = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(empty, empty, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Replaces a dropped feed-forward sub-block: adds zero."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(hidden_states)


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the sub-module at a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def drop_unit(root: nn.Module, unit: Unit, prefix: str = "") -> None:
    """Replace a whole sub-block by a no-op and its norms by the identity; `prefix` is removed from the unit's names."""
    assert unit.module is not None
    assert unit.block is not None
    gone = NoAttention(unit.block) if unit.name.endswith(".attn") else NoFeedForward()
    set_module(root, unit.module.removeprefix(prefix), gone)
    for norm in unit.norms:
        set_module(root, norm.removeprefix(prefix), nn.Identity())
