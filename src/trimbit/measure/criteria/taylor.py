"""Importance of a dim's members from the loss's gradients: LLM-Pruner's Taylor scores.

Legend: W a weight, g = dL/dW of the mean loss, F = the mean over samples of squared gradients (the diagonal of the
empirical Fisher, in place of the Hessian's). What setting an element to zero changes, to some order:
    first: W g        second: W F W        mixed: W g - W F W / 2
A member of a dim is made of channels of several weights: rows of those that write into it, columns of the one that
reads it. Scores are summed over all of them.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from trimbit.calibrate.gradients import Coupled, Gradient
from trimbit.schema.base import Schema

PAPER = "LLM-Pruner, arXiv:2305.11627"
READS = "gradients"


class Config(Schema):
    """Which expansion."""

    # code (horseee/LLM-Pruner): param_first is the default of its code, param_mix that of its text
    kind: Literal["vector", "element_first", "element_second", "element_mixed"] = "element_first"
    samples: int = Field(default=10, ge=1)  # code (horseee/LLM-Pruner)
    length: int = Field(default=64, ge=2)  # code (horseee/LLM-Pruner): tokens of a sample


def score(parts: Sequence[Coupled], size: int, config: Config) -> Float[Tensor, " size"]:
    """Score of each of a dim's `size` members, higher = keep; sums are in fp64.

    `vector` takes |sum of W g| over each channel of each weight, the other kinds the sum of absolute values.
    """
    total = torch.zeros(size, dtype=torch.float64)
    for part in parts:
        channel = _salience(part.gradient, config).double()
        other = 1 - part.axis
        channel = channel.sum(other).abs() if config.kind == "vector" else channel.abs().sum(other)
        inside = part.member >= 0
        total.index_add_(0, part.member[inside], channel.cpu()[inside])
    return total.float()


def _salience(of: Gradient, config: Config) -> Tensor:
    if config.kind in {"vector", "element_first"}:
        return of.w * of.g
    second = of.w.square() * of.fisher
    return second if config.kind == "element_second" else of.w * of.g - second / 2
