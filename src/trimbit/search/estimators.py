"""Binary samples that let gradients through: z is 1 with probability sigmoid(logit).

ReinMax (arXiv:2304.08612), at temperature 1, is exact in the mean where the loss is quadratic in each z; the Gumbel
straight-through estimator (arXiv:1611.01144) passes on the gradient of a soft sample.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Estimator = Literal["reinmax", "gumbel"]


def sample(
    logits: Float[Tensor, " n"], estimator: Estimator, temperature: float, uniform: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Zeros and ones with gradients to the logits, by uniform numbers between 0 and 1.

    `temperature` is at least 1 in ReinMax, at most 1 in Gumbel.
    """
    uniform = uniform.clamp(1e-6, 1 - 1e-6).to(logits)
    if estimator == "reinmax":
        z: Tensor = _ReinMax.apply(logits, temperature, uniform)  # type: ignore[no-untyped-call]
        return z
    soft = torch.sigmoid((logits + torch.logit(uniform)) / temperature)
    return (soft > 0.5).to(soft) + (soft - soft.detach())


class _ReinMax(torch.autograd.Function):
    """The binary case: d logit = g (2 p1 (1 - p1) - p0 (1 - p0) / 2), p1 = (sigmoid(logit / temperature) + z) / 2."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:  # noqa: ANN401
        z = (uniform < torch.sigmoid(logits)).to(logits)
        ctx.save_for_backward(logits, z)
        ctx.temperature = temperature
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        logits, z = ctx.saved_tensors
        p0 = torch.sigmoid(logits)
        p1 = (torch.sigmoid(logits / ctx.temperature) + z) / 2
        return grad * (2 * p1 * (1 - p1) - p0 * (1 - p0) / 2), None, None
