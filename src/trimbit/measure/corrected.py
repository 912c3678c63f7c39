"""Where the second order says too little, a few choices are measured, and predicted damage is corrected by them.

- Leaving out a whole sub-block is too large a change: all such choices are measured.
- Of each kind of large change, some choices are measured, the anchors. From their mean logarithm of measured to
  predicted damage follows one factor for the kind, which changes no order inside it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import exp, log

from trimbit.measure.choices import allowed_formats, allowed_widths, sites_of
from trimbit.model.layout import Layout, Unit
from trimbit.schema.measurements import Anchor, Correction, FormatDamage, Measurements, WidthDamage
from trimbit.schema.space import Space

ANCHORS = 4  # ours: choices of a kind that are measured, from the largest damage to the smallest that matters
PRIOR = 1.0  # ours: a factor of 1 counts as much as this many anchors
FEW_BITS = 3.0  # formats below are a kind
LEAST = 0.05  # ours: of predicted damage; noise of so little text can make measured damage negative


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A choice that is measured."""

    unit: Unit
    choice: FormatDamage | WidthDamage

    @property
    def name(self) -> str:
        """A name for people."""
        choice = self.choice
        if isinstance(choice, WidthDamage):
            return f"{choice.dim}={choice.width}"
        return f"{choice.site} {choice.precision.name}"


def to_measure(found: Measurements, layout: Layout) -> list[Measured]:
    """The choices to measure: sub-blocks that go, and the anchors of each kind."""
    gone = [one for one in found.widths if one.width == 0]
    choices = [Measured(unit=layout.unit_of_dim(one.dim), choice=one) for one in gone]
    return [*choices, *(own for kind in _kinds(found, layout).values() for own in _anchors(kind))]


def count_to_measure(layout: Layout, space: Space) -> int:
    """How many choices will be measured, known before any is predicted."""
    choices: list[FormatDamage | WidthDamage] = []
    for unit in layout.units.values():
        if unit.dim is not None:
            widths = allowed_widths(layout, unit, space)
            choices += [WidthDamage(dim=unit.dim, width=width, damage=0.0) for width in widths]
        pairs = product(sites_of(layout, unit), allowed_formats(unit, space))
        choices += [FormatDamage(site=site, precision=precision, damage=0.0) for site, precision in pairs]
    kinds = Counter(_kind(one, layout) for one in choices)
    gone = sum(isinstance(one, WidthDamage) and one.width == 0 for one in choices)
    return gone + sum(min(ANCHORS, count) for kind, count in kinds.items() if kind is not None)


def corrected(found: Measurements, layout: Layout, measured: Mapping[str, float]) -> Measurements:
    """Predicted damage with what was measured, by name: sub-blocks that go, and a factor for each kind."""
    corrections = []
    for kind, choices in _kinds(found, layout).items():
        pairs = [
            Anchor(name=one.name, predicted=one.choice.damage, measured=measured[one.name]) for one in _anchors(choices)
        ]
        total = sum(log(max(one.measured, LEAST * one.predicted) / one.predicted) for one in pairs)
        corrections.append(Correction(kind=kind, factor=exp(total / (len(pairs) + PRIOR)), anchors=tuple(pairs)))
    factors = {one.kind: one.factor for one in corrections}

    def scaled(one: FormatDamage | WidthDamage) -> float:
        return one.damage * factors.get(_kind(one, layout) or "", 1.0)

    formats = tuple(one.model_copy(update={"damage": scaled(one)}) for one in found.formats)
    widths = tuple(
        one.model_copy(
            update={"damage": measured[f"{one.dim}=0"], "by": "measured"} if one.width == 0 else {"damage": scaled(one)}
        )
        for one in found.widths
    )
    return found.model_copy(update={"formats": formats, "widths": widths, "corrections": tuple(corrections)})


def _kind(one: FormatDamage | WidthDamage, layout: Layout) -> str | None:
    """The kind of a large change to a block; None: the second order is good enough."""
    if isinstance(one, WidthDamage):
        cut = 0 < one.width < layout.unit_of_dim(one.dim).size
        return f"{one.dim.rpartition('.')[2]} cut" if cut else None
    few = one.precision.bits < FEW_BITS and one.site not in layout.units  # sites of ends have their unit's name
    return "few bits" if few else None


def _kinds(found: Measurements, layout: Layout) -> dict[str, list[Measured]]:
    """The predicted choices of each kind, those of largest damage first."""
    kinds: defaultdict[str, list[Measured]] = defaultdict(list)
    units = {layout.weights[name].site: unit for unit in layout.units.values() for name in unit.weights}
    choices: list[FormatDamage | WidthDamage] = [*found.formats, *found.widths]
    for one in choices:
        if (kind := _kind(one, layout)) is not None and one.damage > 0:
            unit = layout.unit_of_dim(one.dim) if isinstance(one, WidthDamage) else units[one.site]
            kinds[kind].append(Measured(unit=unit, choice=one))
    return {kind: sorted(own, key=lambda one: -one.choice.damage) for kind, own in kinds.items()}


def _anchors(choices: list[Measured]) -> Iterator[Measured]:
    """Choices at even steps through the sum of their damage."""
    total, passed, number = sum(one.choice.damage for one in choices), 0.0, 0
    for one in choices:
        passed += one.choice.damage
        if number < ANCHORS and passed >= (number + 0.5) / ANCHORS * total:
            yield one
            while number < ANCHORS and passed >= (number + 0.5) / ANCHORS * total:
                number += 1
