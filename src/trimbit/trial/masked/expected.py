"""Linear layers with the expected error of GPTQ in each channel, in place of one rounding.

Which way GPTQ will round a weight is not known while masks are learnt: other columns change the weight first, and its
group will be different. Masks that see one rounding learn its signs, but the packed model has other signs. Three things
can be predicted: the size of the error, the part of the input that it acts on, and its component along the weight.

The input: the columns swept after column j compensate for its error dW_ij, so of x_j only the part remains that they
do not predict, the residual r_j (`quant.gptq.residuals`):

    Q x = W x - dW r

Along the weight: rounding to few levels shrinks a column, so with a_j the least-squares factor dW_ij = a_j W_ij + rest.
The component along W does not average out over columns; the rest is as good as random. So here

    y = W (x - a r) + xi sqrt(v),  v_i = sum_j rest_ij^2 r_j^2

with xi normal, independent for each token and row. The mask says for each j whether a and rest are those of the low or
of the high format. Noise is drawn for each output, not for each weight (local reparameterisation, arXiv:1506.02557):
its gradient for the mask is that of the variance, and much less noisy.

The squares of the rest are stored as a mean for each row and group, times a factor for each column, and the prediction
of x_j as a low-rank matrix (`residuals.py`): no rounded weight is stored, and all products except that with W are thin.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimbit.trial.masked.cuda_graphs import noise
from trimbit.trial.masked.inputs import Inputs, MaskedLinear, SiteInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Squares:
    """Squared errors of a weight, rows @ cols^T."""

    rows: Float[Tensor, "rows groups"]
    cols: Float[Tensor, "cols groups"]  # zero outside the column's group


def squares(errors: Float[Tensor, "rows cols"], group: int | None) -> Squares:
    """The squares as a mean for each row and group of consecutive columns, times a factor for each column.

    The sums over each row's groups and over each column stay exact.
    """
    squared, cols = errors.square(), errors.shape[1]
    group_of = torch.arange(cols) // (group or cols)
    member = nn.functional.one_hot(group_of).to(squared)
    rows = squared @ member / member.sum(0)
    factors = squared.sum(0) / rows.sum(0)[group_of].clamp(min=torch.finfo(rows.dtype).tiny)
    return Squares(rows=rows, cols=member * factors[:, None])


def along(errors: Float[Tensor, "rows cols"], w: Float[Tensor, "rows cols"]) -> Float[Tensor, " cols"]:
    """The a_j for which a_j w_j is nearest to the errors of column j."""
    return (errors * w).sum(0) / w.square().sum(0).clamp(min=torch.finfo(w.dtype).tiny)


class ErrorModel(nn.Module):
    """The errors of a format, in the original order of columns: the part along the weight, and squares of the rest."""

    along: Tensor
    rows: Tensor
    cols: Tensor

    def __init__(self, errors: Float[Tensor, "rows cols"], w: Tensor, group: int | None, inputs: Inputs) -> None:
        """`errors` and `w` are in the site's order."""
        super().__init__()
        a = along(errors, w)
        found = squares(errors - a * w, group)
        for name, own in (("along", a[inputs.back]), ("rows", found.rows), ("cols", found.cols[inputs.back])):
            self.register_buffer(name, own.to(inputs.compute))

    def variance(self, squared: Float[Tensor, "*batch cols"], chosen: Tensor) -> Float[Tensor, "*batch rows"]:
        """The variance of the output, from the squared residuals of the chosen channels."""
        return squared @ (self.cols * chosen[:, None]) @ self.rows.T

    def slope(self, of_variance: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch cols"]:
        """The gradient for the squared residual of each channel, if it is chosen."""
        return of_variance @ self.rows @ self.cols.T


class _NoisyProduct(torch.autograd.Function):
    """The noisy product; gradients pass straight through the input's rounding, and through residuals and variance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _mask: Tensor, read: SiteInput, layer: "ExpectedLinear") -> Tensor:  # noqa: ANN401
        r, chosen = read.residuals, layer.inputs.chosen
        assert r is not None
        squared = r.square()
        sigma = (layer.low.variance(squared, ~chosen) + layer.high.variance(squared, chosen)).sqrt_()
        xi = noise(sigma, layer.seed)
        ctx.layer, ctx.dtype, ctx.alike = layer, x.dtype, read.low is read.high
        slope = torch.where(sigma > 0, xi / (2 * sigma), 0)  # derivative of the noise with respect to the variance
        ctx.save_for_backward(read.low, read.high, r, chosen, slope)
        shrunk = torch.addcmul(read.mixed, layer.along(chosen), r, value=-1)
        return torch.addcmul(shrunk @ layer.weight.T, sigma, xi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401
        low, high, r, chosen, slope = ctx.saved_tensors
        layer: ExpectedLinear = ctx.layer
        assert layer.inputs.residuals is not None
        through = grad @ layer.weight
        of_low, of_high = (noise.slope(grad * slope) for noise in (layer.low, layer.high))
        of_r = 2 * r * torch.where(chosen, of_high, of_low) - layer.along(chosen) * through
        of_x = through + layer.inputs.residuals.back(of_r)
        per_token = r * (r * (of_high - of_low) - (layer.high.along - layer.low.along) * through)
        of_mask = per_token.flatten(0, -2).sum(0, dtype=torch.float32)
        if not ctx.alike:
            of_mask += ((high - low) * of_x).flatten(0, -2).sum(0, dtype=torch.float32)
        return of_x.to(ctx.dtype), of_mask, None, None


class ExpectedLinear(MaskedLinear):
    """y = W x + b with the expected error of the packed layer: shrinkage and noise."""

    function = _NoisyProduct
    weight: Tensor

    def __init__(
        self, weight: Float[Tensor, "rows cols"], low: ErrorModel, high: ErrorModel, inputs: Inputs, bias: Tensor | None
    ) -> None:
        super().__init__(inputs, bias)
        self.register_buffer("weight", weight.to(inputs.compute))
        self.low, self.high = low, high
        self.seed = 0

    def along(self, chosen: Tensor) -> Float[Tensor, " cols"]:
        """The share of each channel's weight that rounding removes, by the mask."""
        return torch.where(chosen, self.high.along, self.low.along)

    def draw(self, generator: torch.Generator) -> None:
        """Draw new noise, the same in all runs of the layer until the next draw."""
        self.seed = int(torch.randint(2**62, (), generator=generator))
