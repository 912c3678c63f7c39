"""Second moments of a site's inputs: H = E[x x^T] and the mean of x, summed in fp32.

While it is summed, only the lower triangle of H is filled: half of the products.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

GRAM_BLOCK, GRAM_BLOCKS = 256, 16  # least columns of one product, and at most so many products


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Second moments of a site's inputs x [n], over `count` tokens: h = E[x x^T] and mean = E[x].

    If the dense model was run too, with inputs x_dense [m] there: cross = E[x_dense x^T] and dense_mean = E[x_dense].
    """

    count: int
    h: Float[Tensor, "n n"]
    mean: Float[Tensor, " n"]
    cross: Float[Tensor, "m n"] | None = None
    dense_mean: Float[Tensor, " m"] | None = None

    def to(self, device: torch.device) -> "Moments":
        """The same moments on another device."""
        cross, dense_mean = (None if own is None else own.to(device) for own in (self.cross, self.dense_mean))
        return replace(self, h=self.h.to(device), mean=self.mean.to(device), cross=cross, dense_mean=dense_mean)

    def at(self, index: Int[Tensor, " k"]) -> "Moments":
        """The moments of the channels `index` of x."""
        return replace(
            self,
            h=self.h[index][:, index],
            mean=self.mean[index],
            cross=None if self.cross is None else self.cross[:, index],
        )


class Accumulator:
    """Sums moments over chunks of tokens."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Float[Tensor, "tokens n"], dense: Float[Tensor, "tokens m"] | None = None) -> None:
        """Add the inputs of some tokens, rounded to bf16, as a bf16 layer reads them, from whatever dtype."""
        self.count += x.shape[0]
        x = _as_read(x)
        add_gram(self._sum("h", lambda: x.new_zeros(x.shape[1], x.shape[1])), x)
        self._sum("mean", lambda: x.new_zeros(x.shape[1])).add_(x.sum(0))
        if dense is not None:
            dense = _as_read(dense)
            self._sum("cross", lambda: x.new_zeros(dense.shape[1], x.shape[1])).addmm_(dense.T, x)
            self._sum("dense_mean", lambda: x.new_zeros(dense.shape[1])).add_(dense.sum(0))

    def _sum(self, name: str, zero: Callable[[], Tensor]) -> Tensor:
        if name not in self.sums:
            self.sums[name] = zero()
        return self.sums[name]

    def moments(self) -> Moments:
        """The means over all tokens added so far."""
        means = {name: total / self.count for name, total in self.sums.items()}
        return Moments(count=self.count, **means | {"h": mirrored(means["h"])})

    def plus(self, other: "Accumulator") -> "Accumulator":
        """The sum of two accumulators of the same site."""
        total = Accumulator()
        total.count = self.count + other.count
        total.sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return total


def add_gram(total: Float[Tensor, "n n"], x: Float[Tensor, "tokens n"]) -> None:
    """Add the lower triangle of x^T x to `total`, in place; what stands above it afterwards has no meaning."""
    n = x.shape[1]
    step = max(GRAM_BLOCK, -(-n // GRAM_BLOCKS))
    for start in range(0, n, step):
        end = min(start + step, n)
        total[start:end, :end].addmm_(x[:, start:end].T, x[:, :end])


def mirrored(lower: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The symmetric matrix with this lower triangle, in place."""
    return lower.tril_().add_(lower.tril(-1).T)


def _as_read(x: Float[Tensor, "tokens n"]) -> Float[Tensor, "tokens n"]:
    """Round inputs to bf16, as a bf16 layer reads them, but return them in fp32.

    Their products are then exact, and are summed in fp32 on any machine.
    """
    return x.bfloat16().float()
