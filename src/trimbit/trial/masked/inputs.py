"""The inputs that a site's layers share under a mask, as each of the two formats rounds them."""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd import Function

from trimbit.kernels.acts import round_among, take_channels
from trimbit.schema.activations import ActInt
from trimbit.trial.masked.residuals import Residuals


class SiteInput(NamedTuple):
    """The inputs of a site's weights, [*batch, cols] each; the first three are one tensor if nothing is rounded."""

    low: Tensor
    high: Tensor
    mixed: Tensor  # each channel as the mask says
    residuals: Tensor | None  # of the mixed channels


class Inputs(nn.Module):
    """A site's inputs as each format rounds them, and their residuals if expected errors are simulated.

    The channels of a format are rounded as they will be in the packed model: in separate groups, along the site's
    order. The weights of the site read one tensor, one after the other: it is rounded for the first of them, and kept
    until the last.
    """

    order: Tensor
    back: Tensor

    def __init__(
        self, acts: tuple[ActInt | None, ActInt | None], order: Int[Tensor, " cols"], compute: torch.dtype,
        residuals: Residuals | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.acts = acts  # of the low channels, and of the high ones
        self.compute = compute
        self.residuals = residuals
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        self.mask: Tensor | None = None  # [cols], in the original order
        self.readers = self.left = 0
        self.last: tuple[Tensor, SiteInput] | None = None

    @property
    def chosen(self) -> Bool[Tensor, " cols"]:
        """The high channels, as a boolean mask."""
        assert self.mask is not None, "the masks were not set"
        return self.mask.detach() > 0.5

    def forward(self, x: Float[Tensor, "*batch cols"]) -> SiteInput:
        """The inputs of the site's weights from x."""
        if self.last is None or self.last[0] is not x:
            self.last, self.left = (x, self._read(x.detach().to(self.compute))), self.readers
        found = self.last[1]
        self.left -= 1
        if not self.left:
            self.last = None
        return found

    def _read(self, x: Tensor) -> SiteInput:
        chosen = self.chosen
        low, high = (self._rounded(x, acts, own) for acts, own in zip(self.acts, (~chosen, chosen), strict=True))
        mixed = low if low is high else torch.where(chosen, high, low)
        return SiteInput(low, high, mixed, None if self.residuals is None else self.residuals(mixed))

    def _rounded(self, x: Tensor, acts: ActInt | None, counted: Tensor) -> Tensor:
        if acts is None:
            return x
        return take_channels(round_among(take_channels(x, self.order), acts, counted[self.order]), self.back)


class MaskedLinear(nn.Module):
    """A linear layer whose input channels are low or high, as the mask of its site says."""

    function: ClassVar[type[Function]]  # the product, given x, the mask, the site's input and the layer
    bias: Tensor | None

    def __init__(self, inputs: Inputs, bias: Tensor | None) -> None:
        super().__init__()
        self.inputs = inputs
        inputs.readers += 1
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """Round, mix and multiply."""
        y: Tensor = self.function.apply(x, self.inputs.mask, self.inputs(x), self)
        return y if self.bias is None else y + self.bias

    def draw(self, generator: torch.Generator) -> None:
        """Redraw everything random."""
