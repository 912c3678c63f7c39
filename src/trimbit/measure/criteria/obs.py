"""Importance by greedy elimination (optimal brain surgeon) of the channels that a unit's output weight reads.

Legend: W the weight that writes to the residual stream [rows, channels]; H = E[x x^T] of its input, centred, damped; a
member g of a dim is `size` consecutive channels. Removing g costs tr(W_g [H^-1]_gg^-1 W_g^T); afterwards the
remaining weights make up for it, W -= W_g [H^-1]_gg^-1 [H^-1]_g: , and H^-1 is downdated to the channels left.
"""

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from trimbit.calibrate.inverse import damped_inverse
from trimbit.calibrate.moments import Moments
from trimbit.schema.base import Schema

DENSE = 0.25  # ours: share of the channels that may be gone before G and W are copied without them
PAPER = "ZipLM (arXiv:2302.04089) and OSSCAR (arXiv:2403.12983)"
READS = "moments"


class Config(Schema):
    """Constants of the elimination."""

    damping: float = Field(default=0.01, gt=0)  # code (ZipLM): share of mean(diag H)
    # ours: members leave in at most this many rounds, the cheapest of each together
    rounds: int = Field(default=96, ge=1)


def score(w: Float[Tensor, "rows channels"], moments: Moments, size: int, config: Config) -> Float[Tensor, " members"]:
    """The round in which each member leaves, then its cost within the round: higher = keep.

    H^-1 = D G D is downdated as G, which is scaled like a correlation, together with W D^-1: costs are the same.

    Raises:
        NumericsError: if the damped H is not positive definite.
    """
    g, d = damped_inverse(torch.addr(moments.h, moments.mean, moments.mean, alpha=-1), config.damping)
    w = w.to(g.dtype) / d
    members = w.shape[1] // size
    scores = torch.empty(members, device=w.device)
    left = torch.arange(members, device=w.device)  # the members that G and W still hold
    gone = torch.zeros(members, dtype=torch.bool, device=w.device)  # of these, the ones that have left
    per_round = max(1, -(-members // config.rounds))
    for rank in range(0, members, per_round):
        cost = _costs(w, g, size, ~gone)
        leaving = cost.argsort(stable=True)[: min(per_round, members - rank)]
        scores[left[leaving]] = torch.arange(rank, rank + len(leaving), dtype=scores.dtype, device=w.device)
        _remove(w, g, _channels(leaving, size))
        gone[leaving] = True
        if int(gone.sum()) > DENSE * len(left):
            stay = _channels((~gone).nonzero().flatten(), size)
            w, g, left = w[:, stay], g[stay][:, stay], left[~gone]
            gone = torch.zeros_like(left, dtype=torch.bool)
    return scores


def _channels(members: Int[Tensor, " some"], size: int) -> Int[Tensor, " channels"]:
    return (members[:, None] * size + torch.arange(size, device=members.device)).flatten()


def _costs(w: Tensor, g: Tensor, size: int, there: Tensor) -> Tensor:
    """Loss of removing each member alone; infinite for those that are gone."""
    cost = w.new_full((len(there),), torch.inf)
    if size == 1:
        cost[there] = w.square().sum(0)[there] / g.diagonal()[there]
        return cost
    index = _channels(there.nonzero().flatten(), size).view(-1, size)
    blocks = g[index[:, :, None], index[:, None, :]]
    parts = w.T[index]
    cost[there] = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return cost


def _remove(w: Tensor, g: Tensor, channels: Tensor) -> None:
    """Take channels out of W and G in place, the rest making up for them; their rows and columns become zero."""
    across = g[channels]
    solved = torch.linalg.solve(across[:, channels], across)
    w.addmm_(w[:, channels], solved, alpha=-1)
    g.addmm_(across.T, solved, alpha=-1)
