"""Importance by greedy elimination (optimal brain surgeon) of the channels that a unit's output weight reads.

Legend: W the weight that writes to the residual stream [rows, channels]; H = E[x x^T] of its input, centred, damped; a
member g of a dim is `size` consecutive channels. Removing g costs tr(W_g [H^-1]_gg^-1 W_g^T); afterwards the
remaining weights make up for it, W -= W_g [H^-1]_gg^-1 [H^-1]_g: , and H^-1 is downdated to the channels left.
"""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from trimbit.calibrate.inverse import damped_inverse
from trimbit.calibrate.moments import Moments
from trimbit.schema.base import Schema

PAPER = "ZipLM (arXiv:2302.04089) and OSSCAR (arXiv:2403.12983)"
READS = "moments"


class Config(Schema):
    """Constants of the elimination."""

    damping: float = Field(default=0.01, gt=0)  # code (ZipLM): share of mean(diag H)
    # ours: members leave in at most this many rounds, the cheapest of each together
    rounds: int = Field(default=96, ge=1)


def score(w: Float[Tensor, "rows channels"], moments: Moments, size: int, config: Config) -> Float[Tensor, " members"]:
    """The round in which each member leaves, then its cost within the round: higher = keep. Solves in fp64.

    Raises:
        NumericsError: if the damped H is not positive definite.
    """
    mean = moments.mean.double()
    inverse = damped_inverse(moments.h.double() - mean.outer(mean), config.damping)
    w = w.double().clone()
    left = torch.arange(w.shape[1] // size, device=w.device)
    scores = torch.zeros(len(left), dtype=torch.float64, device=w.device)
    per_round = max(1, -(-len(left) // config.rounds))
    rank = 0
    while len(left) > 0:
        cost = _costs(w, inverse, size)
        leaving = cost.argsort(stable=True)[:per_round]
        scores[left[leaving]] = torch.arange(rank, rank + len(leaving), dtype=torch.float64, device=w.device)
        rank += len(leaving)
        staying = torch.ones(len(left), dtype=torch.bool, device=w.device)
        staying[leaving] = False
        w, inverse = _remove(w, inverse, staying.repeat_interleave(size))
        left = left[staying]
    return scores.float()


def _costs(w: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Loss of removing each member alone."""
    members = w.shape[1] // size
    if size == 1:
        return w.square().sum(0) / inverse.diagonal()
    index = torch.arange(members * size, device=w.device).view(members, size)
    blocks = inverse[index[:, :, None], index[:, None, :]]
    parts = w.T.reshape(members, size, -1)
    solved: Tensor = torch.linalg.solve(blocks, parts)
    return (parts * solved).sum((1, 2))


def _remove(w: Tensor, inverse: Tensor, stay: Tensor) -> tuple[Tensor, Tensor]:
    """Take channels out of W and H^-1, the rest making up for them."""
    gone = ~stay
    across = inverse[gone][:, stay]
    solved = torch.linalg.solve(inverse[gone][:, gone], across)
    return w[:, stay] - w[:, gone] @ solved, inverse[stay][:, stay] - across.T @ solved
