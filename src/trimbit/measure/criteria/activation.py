"""Importance of a unit's channels from what flows through them: Wanda-sp and FLAP.

Legend: W the weight that writes to the residual stream [rows, channels], x its input. A member of a dim is `size`
consecutive channels: one for a feed-forward channel, all query heads of a group for a KV group.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from trimbit.calibrate.moments import Moments
from trimbit.schema.base import Schema

PAPER = "Wanda-sp and FLAP: An et al. 2023, arXiv:2312.11983"
READS = "moments"


class Config(Schema):
    """Which of the two."""

    kind: Literal["wanda_sp", "flap"] = "flap"


def score(w: Float[Tensor, "rows channels"], moments: Moments, size: int, config: Config) -> Float[Tensor, " members"]:
    """Score of each member of the dim, higher = keep.

    Wanda-sp: mean over rows of |W_ij| sqrt(E x_j^2). FLAP: Var(x_j) |W_:j|^2. Both summed over the member's channels.
    """
    if config.kind == "wanda_sp":
        channel = w.abs().mean(0) * moments.h.diagonal().clamp(min=0).sqrt()
    else:
        channel = (moments.h.diagonal() - moments.mean**2).clamp(min=0) * w.square().sum(0)
    return channel.view(-1, size).sum(1)
