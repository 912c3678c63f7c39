"""What a site's layers share under a mask: the inputs, as each of its two formats rounds them."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function

from trimbit.kernels.acts import round_among, take_channels
from trimbit.precision import ActInt


class Inputs(nn.Module):
    """A site's inputs as each version rounds them.

    The channels of a version are rounded as they are once stored: in groups of their own, along the site's
    order. The weights of the site read one tensor, one after the other: it is rounded for the first of
    them, and kept until the last. Both are the input itself where neither is rounded.
    """

    order: Tensor
    back: Tensor

    def __init__(
        self, acts: tuple[ActInt | None, ActInt | None], order: Int[Tensor, " cols"], compute: torch.dtype
    ) -> None:
        super().__init__()
        self.acts = acts  # of the low channels, and of the high ones
        self.compute = compute
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        self.mask: Tensor | None = None  # [cols], in the original order
        self.readers = self.left = 0
        self.last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Float[Tensor, "*batch cols"]) -> tuple[Tensor, Tensor]:
        """For the low version, and for the high one."""
        if self.last is None or self.last[0] is not x:
            assert self.mask is not None, "the masks were not set"
            plain, chosen = x.detach().to(self.compute), self.mask.detach() > 0.5
            low, high = (
                self._rounded(plain, acts, own) for acts, own in zip(self.acts, (~chosen, chosen), strict=True)
            )
            self.last, self.left = (x, (low, high)), self.readers
        found = self.last[1]
        self.left -= 1
        if not self.left:
            self.last = None
        return found

    def _rounded(self, x: Tensor, acts: ActInt | None, counted: Tensor) -> Tensor:
        if acts is None:
            return x
        return take_channels(round_among(take_channels(x, self.order), acts, counted[self.order]), self.back)


class MaskedLinear(nn.Module):
    """A linear layer whose input channels are low or high, as the mask of its site says."""

    function: ClassVar[type[Function]]  # of x, its low and its high rounding, the mask and the layer: the product
    bias: Tensor | None

    def __init__(self, inputs: Inputs, bias: Tensor | None) -> None:
        super().__init__()
        self.inputs = inputs
        inputs.readers += 1
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """Round, mix and multiply."""
        y: Tensor = self.function.apply(x, *self.inputs(x), self.inputs.mask, self)
        return y if self.bias is None else y + self.bias

    def draw(self, generator: torch.Generator) -> None:
        """Draw anew what is left to chance."""
