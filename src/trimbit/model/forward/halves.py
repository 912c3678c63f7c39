"""Run only one half of a block, or only its last projection."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trimbit.model.forward.absent import NoAttention, NoFeedForward, set_module
from trimbit.model.layout import Layout, Unit


@contextmanager
def only_half(block: nn.Module, layout: Layout, unit: Unit) -> Iterator[None]:
    """Make a block run only one sub-block, x + f(norm(x)); the other becomes a no-op."""
    assert unit.block is not None
    attention = unit.name.endswith(".attn")
    other = (layout.family.mlp if attention else layout.family.attn).module
    module = block.get_submodule(other)
    set_module(block, other, NoFeedForward() if attention else NoAttention(unit.block))
    try:
        yield
    finally:
        set_module(block, other, module)


@contextmanager
def input_known(root: nn.Module, unit: Unit, x: Tensor, prefix: str = "") -> Iterator[None]:
    """Make a sub-block run only its last projection, on the known input x, already reordered and rounded."""
    assert unit.module is not None
    assert unit.out_weight is not None
    module: Any = root.get_submodule(unit.module.removeprefix(prefix))
    project = root.get_submodule(unit.out_weight.removeprefix(prefix))
    attention = unit.name.endswith(".attn")
    module.forward = lambda *_, **__: (project.forward(x), None) if attention else project.forward(x)
    try:
        yield
    finally:
        del module.forward
