"""Binary samples with gradient estimators: z is 1 with probability sigmoid(logit).

ReinMax (arXiv:2304.08612), at temperature 1, is unbiased if the loss is quadratic in each z; the Gumbel
straight-through estimator (arXiv:1611.01144) passes on the gradient of a soft sample.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Estimator = Literal["reinmax", "gumbel"]


def sample(
    logits: Float[Tensor, " n"], estimator: Estimator, temperature: float, uniform: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Zeros and ones with gradients for the logits, drawn by uniform numbers between 0 and 1.

    `temperature` is at least 1 in ReinMax, at most 1 in Gumbel.
    """
    uniform = uniform.clamp(1e-6, 1 - 1e-6).to(logits)
    if estimator == "gumbel":
        soft = torch.sigmoid((logits + torch.logit(uniform)) / temperature)
        return (soft > 0.5).to(soft) + (soft - soft.detach())
    own = logits.detach()
    p0 = torch.sigmoid(own)
    z = (uniform < p0).to(own)
    p1 = (torch.sigmoid(own / temperature) + z) / 2
    return z + (logits - own) * (2 * p1 * (1 - p1) - p0 * (1 - p0) / 2)
