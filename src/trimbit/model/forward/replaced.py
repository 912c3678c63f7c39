"""Run a block with other weights in some of its layers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def weights_replaced(block: nn.Module, state: Callable[[], Mapping[str, Tensor]], prefix: str = "") -> Iterator[None]:
    """Give layers of a block the weights and biases of `state`, by name without `prefix`; a layer may gain a bias."""
    before: list[tuple[Any, str, nn.Parameter | None]] = []
    for name, tensor in state().items():
        layer, _, kind = name.removeprefix(prefix).rpartition(".")
        module: Any = block.get_submodule(layer)
        before.append((module, kind, getattr(module, kind)))
        setattr(module, kind, nn.Parameter(tensor.to(module.weight), requires_grad=False))
    try:
        yield
    finally:
        for module, kind, parameter in before:
            setattr(module, kind, parameter)
