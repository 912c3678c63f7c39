"""Linear layers with two versions of their weight, each rounded to its format.

Both versions stay packed and are dequantised for each product, or are kept dense. A product is linear in the mask,
y = ((1 - m) x_low) W_low^T + (m x_high) W_high^T, where x_low and x_high are the inputs as each format rounds them; it
is computed for masks of zeros and ones, and its gradient is that of this formula.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimbit.kernels.acts import take_channels
from trimbit.kernels.qtensor import QTensor
from trimbit.runtime.layers import Packed
from trimbit.trial.masked.inputs import Inputs, MaskedLinear, SiteInput


class RoundedWeight(nn.Module):
    """One version of a weight, whose columns are stored in the site's order."""

    kept: Tensor | None

    def __init__(self, packed: QTensor, inputs: Inputs, dense: bool) -> None:
        super().__init__()
        self.packed: Packed | None = Packed.of(packed)
        self.inputs = inputs
        self.register_buffer("kept", None)
        if dense:
            self.kept, self.packed = self.dense(inputs.compute), None

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
        """The matrix, its channels in their original order."""
        if self.kept is not None:
            return self.kept.to(dtype)
        assert self.packed is not None
        return take_channels(self.packed.dense(dtype), self.inputs.back)


class _MixedProduct(torch.autograd.Function):
    """The product of the rounded inputs; gradients pass to the input straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _mask: Tensor, read: SiteInput, layer: "RoundedLinear") -> Tensor:  # noqa: ANN401
        chosen = layer.inputs.chosen
        ctx.layer, ctx.dtype, ctx.alike = layer, x.dtype, read.low is read.high
        ctx.save_for_backward(read.low, read.high, chosen)
        compute = layer.inputs.compute
        return read.mixed @ torch.where(chosen, layer.high.dense(compute), layer.low.dense(compute)).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401
        low, high, chosen = ctx.saved_tensors
        layer: RoundedLinear = ctx.layer
        w_low = layer.low.dense(grad.dtype)
        to_low = grad @ w_low
        more = grad @ (layer.high.dense(grad.dtype) - w_low)  # subtract before the product, against cancellation
        of_mask = (high * more).flatten(0, -2).sum(0, dtype=torch.float32)
        if not ctx.alike:
            of_mask += ((high - low) * to_low).flatten(0, -2).sum(0, dtype=torch.float32)
        of_x = torch.where(chosen, to_low + more, to_low).to(ctx.dtype)
        return of_x, of_mask, None, None


class RoundedLinear(MaskedLinear):
    """y = W x + b with W mixed from two versions by the mask; their columns are in the inputs' order."""

    function = _MixedProduct

    def __init__(self, low: QTensor, high: QTensor, inputs: Inputs, bias: Tensor | None, *, dense: bool) -> None:
        super().__init__(inputs, bias)
        self.low, self.high = (RoundedWeight(own, inputs, dense) for own in (low, high))
