"""What happens to a site's input before its weights read it: channels go into the stored order, then are rounded.

It is done once for all weights of the site: to what a norm gives, or to what a lone weight takes. The order lies in a
buffer `order` of that module.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from trimbit.kernels.acts import round_activations, take_channels
from trimbit.schema.activations import ActRun


@dataclass(frozen=True)
class _InputHook:
    """Hooks of a module, or of what stands around it."""

    owner: nn.Module  # has the order
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
    """Reorder and round what a module gives, or, if it is a weight's layer, what it takes."""
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
    """Let what stands around a module change its input, for all that it holds."""
    hooks = [*module._forward_pre_hooks.values()]
    module._forward_pre_hooks.clear()
    for hook in hooks:
        around.register_forward_pre_hook(hook)


def stored_order(module: nn.Module) -> Tensor | None:
    """The order that a module gathers its input, or what it gives, in; None if it does not."""
    return module._buffers.get("order")
