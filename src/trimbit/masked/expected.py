"""Linear layers with the error that GPTQ is expected to leave in each channel, in place of one rounding.

Which way GPTQ will round a weight is not known while masks are learnt: it rounds what other columns have changed, in
other groups. Masks that see one rounding learn its signs, and the packed model has others. How large the error will be
is known. Let dW be the error of rounding to nearest, and left_j what `quant.gptq.uncompensated` says: then

    E |W x - Q x|^2 = sum over rows i and columns j of (dW_ij left_j)^2 E x_j^2

as if columns were independent. So here y = W x + xi sqrt(v), v_i = sum_j (dW_ij left_j)^2 x_j^2, with xi normal, its
own for each token and row. The mask says for each j whether dW is that of the low or of the high format. Noise is drawn
where the error is felt, not for each weight (local reparameterisation, arXiv:1506.02557): its gradient for the mask is
that of the variance, with far less chance in it.

The squares are kept as a mean for each row and group, times a factor for each column: no rounded weight is stored, and
the products for the variance are with as many columns as there are groups.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimbit.masked.inputs import Inputs, MaskedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Squares:
    """Squared errors of a weight, rows @ cols^T."""

    rows: Float[Tensor, "rows groups"]
    cols: Float[Tensor, "cols groups"]  # zero but in the column's group


def squares(errors: Float[Tensor, "rows cols"], group: int | None) -> Squares:
    """The squares as a mean for each row and group of consecutive columns, times a factor for each column.

    The sums over the columns of a group, row by row, are those of the squares, and so are the sums over all rows.
    """
    squared, cols = errors.square(), errors.shape[1]
    group_of = torch.arange(cols) // (group or cols)
    member = nn.functional.one_hot(group_of).to(squared)
    rows = squared @ member / member.sum(0)
    factors = squared.sum(0) / rows.sum(0)[group_of].clamp(min=torch.finfo(rows.dtype).tiny)
    return Squares(rows=rows, cols=member * factors[:, None])


class Noise(nn.Module):
    """The squared errors of a format, in the original order of columns."""

    rows: Tensor
    cols: Tensor

    def __init__(self, found: Squares, inputs: Inputs) -> None:
        super().__init__()
        self.register_buffer("rows", found.rows.to(inputs.compute))
        self.register_buffer("cols", found.cols[inputs.back].to(inputs.compute))

    def variance(self, squared: Float[Tensor, "*batch cols"], chosen: Tensor) -> Float[Tensor, "*batch rows"]:
        """Of the output, by the squared inputs of the chosen channels."""
        return squared @ (self.cols * chosen[:, None]) @ self.rows.T

    def slope(self, of_variance: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch cols"]:
        """The gradient for the squared input of each channel, if it is chosen."""
        return of_variance @ self.rows @ self.cols.T


class _NoisyProduct(torch.autograd.Function):
    """Gradients pass to the input straight through its rounding, and through the variance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, mask: Tensor, layer: "ExpectedLinear") -> Tensor:  # noqa: ANN401
        chosen = mask > 0.5
        mixed = low if low is high else torch.where(chosen, high, low)
        squared = mixed.square()
        sigma = (layer.low.variance(squared, ~chosen) + layer.high.variance(squared, chosen)).sqrt_()
        generator = torch.Generator(x.device).manual_seed(layer.seed)
        xi = torch.randn(sigma.shape, generator=generator, device=x.device, dtype=sigma.dtype)
        ctx.layer, ctx.dtype, ctx.alike = layer, x.dtype, low is high
        slope = torch.where(sigma > 0, xi / (2 * sigma), 0)  # of the noise, for the variance
        ctx.save_for_backward(low, high, chosen, slope)
        return torch.addcmul(mixed @ layer.weight.T, sigma, xi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor, None]:  # noqa: ANN401
        low, high, chosen, slope = ctx.saved_tensors
        layer: ExpectedLinear = ctx.layer
        through = grad @ layer.weight
        of_low, of_high = (noise.slope(grad * slope) for noise in (layer.low, layer.high))
        of_mask = (high.square() * of_high - low.square() * of_low).flatten(0, -2).sum(0, dtype=torch.float32)
        if not ctx.alike:
            of_mask += ((high - low) * through).flatten(0, -2).sum(0, dtype=torch.float32)
        of_x = through + 2 * torch.where(chosen, high * of_high, low * of_low)
        return of_x.to(ctx.dtype), None, None, of_mask, None


class ExpectedLinear(MaskedLinear):
    """y = W x + b and noise of the variance that the error of the packed layer is expected to have."""

    function = _NoisyProduct
    weight: Tensor

    def __init__(
        self, weight: Float[Tensor, "rows cols"], low: Squares, high: Squares, inputs: Inputs, bias: Tensor | None
    ) -> None:
        super().__init__(inputs, bias)
        self.register_buffer("weight", weight.to(inputs.compute))
        self.low, self.high = Noise(low, inputs), Noise(high, inputs)
        self.seed = 0

    def draw(self, generator: torch.Generator) -> None:
        """Other noise from now on, the same whenever the layer is run."""
        self.seed = int(torch.randint(2**62, (), generator=generator))
