"""Predict the damage of groups of a site's input channels: left out, or in each of some formats.

The damage is that of `measure.predict`, by columns of the weights that read a site in place of whole weights. That of a
format, over all groups, adds up to the damage of the site. Leaving out a group makes dependent errors in the rows, so
that is taken token by token; nothing is refitted.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimbit.calibrate.sensitivity import Groups, Sensitivity, sweep
from trimbit.jobs.progress import Progress
from trimbit.measure.predict import some_rows
from trimbit.model.forward.stream import BlockStream
from trimbit.schema.precision import Precision


@runtime_checkable
class ColumnErrors(Protocol):
    """Errors that a quantiser is expected to leave, by column."""

    def of_columns(
        self, name: str, rows: Int[Tensor, " some"], precision: Precision, weights: Float[Tensor, " some"]
    ) -> Float[Tensor, " cols"]:
        """The expected squared error of each column, summed over some rows by their weights; not yet felt."""

    def felt(self, name: str, h: Float[Tensor, "cols cols"]) -> Float[Tensor, " cols"]:
        """The mean square of what an error in each column is felt on, where the inputs' second moment is `h`."""


def predict_groups(
    stream: BlockStream, tokens: Int[Tensor, "rows length"], draws: int, seed: int, groups: Groups,
    formats: Sequence[Precision], errors: ColumnErrors, progress: Progress,
) -> dict[str, Float[Tensor, "groups choices"]]:  # fmt: skip
    """The damage of each group of each site, in nats of KL a token: left out, then in each format.

    Args:
        stream: the dense model.
        tokens: rows of text.
        draws: labels drawn for each token.
        seed: of the drawn labels.
        groups: the group of each input channel, counted from 0, by site of a block.
        formats: the formats.
        errors: what the quantiser is expected to leave.
        progress: counts blocks, forward and backward.
    """
    damage: dict[str, Tensor] = {}
    for found in sweep(stream, tokens, draws, seed, lambda _index: {}, progress, groups):
        for site, gone in found.gone.items():
            own = groups[site].to(gone.device)
            columns = sum(
                (_by_column(name, found.weights[name], formats, errors) for name in _readers(stream, site)),
                torch.zeros(len(formats), len(own), device=gone.device),
            )
            by_group = gone.new_zeros(len(gone), len(formats)).index_add_(0, own, columns.T)
            damage[site] = torch.cat([gone[:, None], by_group], 1).cpu()
    return damage


def _by_column(
    name: str, own: Sensitivity, formats: Sequence[Precision], errors: ColumnErrors
) -> Float[Tensor, "formats cols"]:
    """1/2 sum_i b_i E[e_ij^2] of a weight, in each format."""
    index, weights = some_rows([own])
    felt = errors.felt(name, own.h) / 2
    return torch.stack([errors.of_columns(name, index, precision, weights[:, 0]) * felt for precision in formats])


def _readers(stream: BlockStream, site: str) -> list[str]:
    return [weight.name for weight in stream.layout.readers(site)]
