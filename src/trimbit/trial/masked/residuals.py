"""What GPTQ's errors are felt on: of each channel, what those swept after it do not predict."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

OVERSAMPLING = 8  # of a randomised decomposition: vectors beyond its rank


class Residuals(nn.Module):
    """What the columns swept later do not predict of each channel of a site.

    The prediction is of low rank; each residual is scaled to the mean square that it has with all of the prediction.
    """

    reads: Tensor
    writes: Tensor
    scale: Tensor

    def __init__(
        self, exact: Float[Tensor, "cols cols"], h: Float[Tensor, "cols cols"], rank: int, compute: torch.dtype
    ) -> None:
        """`exact` maps inputs to residuals, and h is the inputs' second moment, as GPTQ damps it.

        The prediction is P x with P = I - exact, and its moment P H P^T. With A the largest eigenvectors of that,
        A A^T P x is the best prediction of that rank.
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
    """The eigenvectors of largest eigenvalue, very nearly."""
    rank = min(rank, len(moment))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, _, _ = torch.svd_lowrank(moment, q=min(rank + OVERSAMPLING, len(moment)), niter=4)
    return u[:, :rank]
