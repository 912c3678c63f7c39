"""Two or three levels of least squared error: exactly, from sums over a sorted group.

Legend: x [..., n] a group; c its costs; the squared error is the sum of c (x - q)^2, with q the nearest level. Whatever
the costs, the elements of one level are neighbours in sorted order, and their best level is their mean weighted by c.
So the best split of the sorted group gives the optimum: Lloyd's two conditions, met without iterating.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

SMALL = 1e-12  # ours: a part with less than this share of the costs gets no separate level


def mean_size(x: Float[Tensor, "rows groups n"], c: Float[Tensor, "1 groups n"]) -> Float[Tensor, "rows groups 1"]:
    """The s of levels -s and s: the mean |x|, since the error is that of |x| at the level s."""
    return (x.abs() * c).sum(-1, keepdim=True) / c.sum(-1, keepdim=True)


def ternary_scale(x: Float[Tensor, "rows groups n"], c: Float[Tensor, "1 groups n"]) -> Float[Tensor, "rows groups 1"]:
    """The s of levels -s, 0 and s.

    With the k largest |x| at s, their mean, the error is that of all zeros minus s times the sum of their c |x|.
    """
    total, cost = _sums(-x.abs(), c)
    s = -_mean(total, cost, cost[..., -1:])
    return s.gather(-1, (-s * total).argmax(-1, keepdim=True)).float()


def middle_of_two(x: Float[Tensor, "rows groups n"], c: Float[Tensor, "1 groups n"]) -> Float[Tensor, "rows groups 1"]:
    """The middle of two free levels.

    With the k smallest x at the lower level and the others at the upper level, each the mean of its elements, the error
    is that of all zeros minus, for each level, the level times the sum of its c x. Sums are over x minus its mean, to
    avoid cancellation.
    """
    middle = (x * c).sum(-1, keepdim=True) / c.sum(-1, keepdim=True)
    total, cost = _sums(x - middle, c)
    rest, whole = total[..., -1:] - total, cost[..., -1:]
    low, high = _mean(total, cost, whole), _mean(rest, whole - cost, whole)
    best = (low * total + high * rest).argmax(-1, keepdim=True)
    return middle + (low + high).gather(-1, best).float() / 2


def _sums(x: Tensor, c: Tensor) -> tuple[Float64[Tensor, "rows groups n"], Float64[Tensor, "rows groups n"]]:
    """Sums of c x and of c over the k smallest x, k = 1 .. n."""
    x, order = x.sort(dim=-1)
    cost = c.expand_as(x).gather(-1, order)
    return (x * cost).cumsum(-1, dtype=torch.float64), cost.cumsum(-1, dtype=torch.float64)


def _mean(total: Tensor, cost: Tensor, whole: Tensor) -> Tensor:
    return total / cost.maximum(whole * SMALL)
