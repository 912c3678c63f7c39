"""Hooks that reorder the channels of a site's input into the stored order, and then round them.

This is done once for all weights of the site: at the output of a norm, or at the input of a single weight. The order is
a buffer `order` of that module.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from trimbit.kernels.acts import round_activations, take_channels
from trimbit.schema.activations import ActRun


@dataclass(frozen=True)
class _InputHook:
    """Hooks on a module, or on its wrapper."""

    owner: nn.Module  # the module with the buffer `order`
    acts: tuple[ActRun, ...]

    def after(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._changed(output)

    def before(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._changed(inputs[0]), *inputs[1:])

    def _changed(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        order = stored_order(self.owner)
        if order is not None:
            x = take_channels(x, order)
        return round_activations(x, self.acts) if self.acts else x


def transform_input(
    module: nn.Module, *, at_output: bool, order: Int[Tensor, " n"] | None = None, acts: tuple[ActRun, ...] = ()
) -> None:
    """Reorder and round the output of a module, or its input if `at_output` is false."""
    if order is None and not acts:
        return
    if order is not None:
        module.register_buffer("order", order)
    change = _InputHook(module, acts)
    if at_output:
        module.register_forward_hook(change.after)
    else:
        module.register_forward_pre_hook(change.before)


def move_hooks(module: nn.Module, around: nn.Module) -> None:
    """Move the input hooks of a module to its wrapper, so that they act on the input of the whole wrapper."""
    hooks = [*module._forward_pre_hooks.values()]
    module._forward_pre_hooks.clear()
    for hook in hooks:
        around.register_forward_pre_hook(hook)


def stored_order(module: nn.Module) -> Tensor | None:
    """The order in which a module's input or output is gathered; None if it is not reordered."""
    return module._buffers.get("order")
