"""Predict the damage of every choice from one sweep back through the model, in place of a forward pass for each.

Damage is the KL to second order (`calibrate.sensitivity`): of a format, for the errors that its quantiser is expected
to leave; of a width, for what the cut and its refit change. Both are of the dense model, whatever else is chosen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimbit.calibrate.sensitivity import Change, Sensitivities, Sensitivity, sweep
from trimbit.jobs.progress import Progress
from trimbit.measure.choices import allowed_formats, allowed_widths, cut_name, sites_of
from trimbit.model.forward.stream import BlockStream
from trimbit.model.layout import Unit
from trimbit.schema.measurements import Background, FormatDamage, Measurements, WidthDamage
from trimbit.schema.plan import ModelRef
from trimbit.schema.precision import BF16, Precision
from trimbit.schema.space import Space

ROWS = 256  # ours: of a weight, those whose errors are looked at; the rest is like them


@runtime_checkable
class Errors(Protocol):
    """Errors that a quantiser is expected to leave."""

    def of_rows(
        self, name: str, rows: Int[Tensor, " some"], precision: Precision, felt: Float[Tensor, "cols places"]
    ) -> Float[Tensor, "some places"]:
        """The expected squared error of some rows' output, where that of each column counts as `felt` in each place."""

    def felt(self, name: str, h: Float[Tensor, "cols cols"]) -> Float[Tensor, " cols"]:
        """The mean square of what an error in each column is felt on, where the inputs' second moment is `h`."""


Cut = Callable[[Unit, int], Change]  # what a unit's width changes, the weight that writes its output being refitted


def predict(
    stream: BlockStream, tokens: Int[Tensor, "rows length"], draws: int, seed: int, space: Space, errors: Errors,
    cut: Cut, rankings: Mapping[str, tuple[int, ...]], model: ModelRef, data_digest: str, progress: Progress,
) -> Measurements:  # fmt: skip
    """The damage of every format of every site and every width of every dim, in nats of KL a token."""
    layout = stream.layout
    formats: dict[str, tuple[FormatDamage, ...]] = {}
    widths: dict[str, float] = {}

    def changes(index: int) -> dict[str, Change]:
        units = [unit for unit in layout.units.values() if unit.block == index and unit.dim is not None]
        return {
            cut_name(unit, width, rankings): cut(unit, width)
            for unit in units
            for width in allowed_widths(layout, unit, space)
            if width != unit.size
        }

    ends: dict[str, Sensitivity] = {}
    for found in sweep(stream, tokens, draws, seed, changes, progress):
        widths |= found.changes
        for unit in layout.units.values():
            if unit.block is not None and unit.weights[0] in found.weights:
                formats[unit.name] = tuple(_formats(stream, unit, space, errors, found))
        ends |= {name: own for name, own in found.weights.items() if name in {layout.family.embed, layout.family.head}}
    for unit in layout.units.values():
        if unit.block is None:
            formats[unit.name] = tuple(_of_end(stream, unit, space, errors, ends))
    every = [site for unit in layout.units.values() for site in sites_of(layout, unit)]
    return Measurements(
        model=model, data_digest=data_digest, seed=seed,
        background=Background(widths={}, formats=dict.fromkeys(every, BF16)), background_damage=0.0,
        rankings=dict(rankings),
        formats=tuple(one for unit in layout.units.values() for one in formats[unit.name]),
        widths=tuple(
            WidthDamage(
                dim=unit.dim, width=width, damage=widths.get(cut_name(unit, width, rankings), 0.0), by="predicted"
            )
            for unit in layout.units.values()
            if unit.dim is not None
            for width in allowed_widths(layout, unit, space)
        ),
    )  # fmt: skip


def _formats(
    stream: BlockStream, unit: Unit, space: Space, errors: Errors, found: Sensitivities
) -> Iterator[FormatDamage]:
    """Of the sites of a sub-block: the sum over the weights that read each."""
    for site, names in sites_of(stream.layout, unit).items():
        read = [_Rows.of(name, [found.weights[name]], errors) for name in names]
        for precision in allowed_formats(unit, space):
            damage = sum(own.damage(precision, errors) for own in read)
            yield FormatDamage(site=site, precision=precision, damage=damage, by="predicted")


def _of_end(
    stream: BlockStream, unit: Unit, space: Space, errors: Errors, ends: Mapping[str, Sensitivity]
) -> Iterator[FormatDamage]:
    """Of the embedding or the head; where they are one weight, its errors are felt in both places."""
    family, (name,) = stream.layout.family, unit.weights
    places = [ends[family.embed], ends[family.head]] if stream.layout.tied else [ends[name]]
    read = _Rows.of(name, places, errors)
    for precision in allowed_formats(unit, space):
        yield FormatDamage(
            site=unit.name, precision=precision, damage=read.damage(precision, errors), by="predicted"
        )  # fmt: skip


def some_rows(places: Sequence[Sensitivity]) -> tuple[Int[Tensor, " some"], Float[Tensor, "some places"]]:
    """All rows, or `ROWS` at even steps through the sum of their sensitivities, and by how much each of them counts."""
    b = torch.stack([own.rows for own in places], 1)
    if len(b) <= ROWS:
        return torch.arange(len(b), device=b.device), b
    share = (b / b.sum(0).clamp(min=torch.finfo(b.dtype).tiny)).mean(1)
    steps = (torch.arange(ROWS, device=b.device) + 0.5) / ROWS * share.sum()
    found = torch.searchsorted(share.cumsum(0), steps).clamp(max=len(b) - 1)
    index, counts = found.unique(return_counts=True)
    return index, b[index] * (counts / (ROWS * share[index]))[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Some rows of a weight, which stand for all of them."""

    name: str
    index: Int[Tensor, " some"]
    weights: Float[Tensor, "some places"]  # by which their errors count in each place
    felt: Float[Tensor, "cols places"]

    @classmethod
    def of(cls, name: str, places: Sequence[Sensitivity], errors: Errors) -> "_Rows":
        """Of `some_rows`."""
        index, weights = some_rows(places)
        return cls(
            name=name, index=index, weights=weights, felt=torch.stack([errors.felt(name, p.h) for p in places], 1)
        )

    def damage(self, precision: Precision, errors: Errors) -> float:
        """1/2 sum_i b_i E[e_i^2], summed over the places where the weight's errors are felt."""
        return float((self.weights * errors.of_rows(self.name, self.index, precision, self.felt)).sum()) / 2
