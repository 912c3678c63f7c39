"""The input that GPTQ's errors act on: the part of each channel that those swept after it do not predict."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

OVERSAMPLING = 8  # vectors of the randomised decomposition beyond the rank


class Residuals(nn.Module):
    """The part of each channel of a site that the columns swept later do not predict.

    The prediction has low rank; each residual is scaled to the mean square that it has with the full prediction.
    """

    reads: Tensor
    writes: Tensor
    scale: Tensor

    def __init__(
        self, exact: Float[Tensor, "cols cols"], h: Float[Tensor, "cols cols"], rank: int, compute: torch.dtype
    ) -> None:
        """`exact` maps inputs to residuals, and `h` is the inputs' second moment, damped as in GPTQ.

        The prediction is P x with P = I - exact, and its second moment is P H P^T. With A the leading eigenvectors of
        that matrix, A A^T P x is the best prediction of the same rank.
        """
        super().__init__()
        predicted = torch.eye(len(h), dtype=exact.dtype) - exact
        a = _largest(predicted @ h @ predicted.T, rank)
        b = predicted.T @ a
        ours = torch.eye(len(h), dtype=exact.dtype) - a @ b.T
        squares, own = (((every @ h) * every).sum(1) for every in (exact, ours))
        scale = (squares / own.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
        for name, found in (("writes", a), ("reads", b), ("scale", scale)):
            self.register_buffer(name, found.to(compute))

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch cols"]:
        """The residuals of inputs."""
        return self.scale * (x - (x @ self.reads) @ self.writes.T)

    def back(self, of_residuals: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch cols"]:
        """The gradient for the inputs."""
        scaled = self.scale * of_residuals
        return scaled - (scaled @ self.writes) @ self.reads.T


def _largest(moment: Float[Tensor, "cols cols"], rank: int) -> Float[Tensor, "cols rank"]:
    """The leading eigenvectors, to a close approximation."""
    rank = min(rank, len(moment))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, _, _ = torch.svd_lowrank(moment, q=min(rank + OVERSAMPLING, len(moment)), niter=4)
    return u[:, :rank]
