"""Where the second order says too little, a few choices are measured, and predicted damage is corrected by them.

- Leaving out a whole sub-block is too large a change: all such choices are measured.
- Large changes that are alike are a kind, of which some are measured, the anchors. From the mean logarithm of measured
  to predicted damage follows one factor for the kind, which changes no order inside it.
- Cuts of all KV heads are a kind, and cuts of all channels; those of the first and of the last block are kinds of their
  own. So are the formats of few bits of each site, since sites differ by more than a factor of 4 there.
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

ANCHORS = 6  # ours: choices of a kind that are measured, from the largest damage to the smallest that matters
PRIOR = 1.0  # ours: a factor of 1 counts as much as this many anchors
FEW_BITS = 3.0  # ours: from here on the second order is good enough
MOST = 8.0  # ours: a measured ratio is taken for no more, nor for less than its inverse; small damage may be all noise


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
    return [*choices, *(one for kind, own in _kinds(found, layout).items() for one in anchors(own, kind.anchors))]


def count_to_measure(layout: Layout, space: Space) -> int:
    """How many choices will be measured, known before any is predicted."""
    choices: list[FormatDamage | WidthDamage] = []
    for unit in layout.units.values():
        if unit.dim is not None:
            widths = allowed_widths(layout, unit, space)
            choices += [WidthDamage(dim=unit.dim, width=width, damage=0.0) for width in widths]
        pairs = product(sites_of(layout, unit), allowed_formats(unit, space))
        choices += [FormatDamage(site=site, precision=precision, damage=0.0) for site, precision in pairs]
    kinds = Counter(kind for one in choices if (kind := _kind(one, layout)) is not None)
    gone = sum(isinstance(one, WidthDamage) and one.width == 0 for one in choices)
    return gone + sum(min(kind.anchors, count) for kind, count in kinds.items())


def corrected(found: Measurements, layout: Layout, measured: Mapping[str, float]) -> Measurements:
    """Predicted damage with what was measured, by name: sub-blocks that go, and a factor for each kind."""
    corrections = {}
    for kind, choices in _kinds(found, layout).items():
        pairs = [
            Anchor(name=one.name, predicted=one.choice.damage, measured=measured[one.name])
            for one in anchors(choices, kind.anchors)
        ]
        ratios = [min(max(one.measured / one.predicted, 1 / MOST), MOST) for one in pairs]
        factor = exp(sum(map(log, ratios)) / (len(pairs) + kind.prior))
        corrections[kind] = Correction(kind=kind.name, factor=factor, anchors=tuple(pairs))

    def scaled(one: FormatDamage | WidthDamage) -> float:
        kind = _kind(one, layout)
        return one.damage * corrections[kind].factor if kind in corrections else one.damage

    formats = tuple(one.model_copy(update={"damage": scaled(one)}) for one in found.formats)
    widths = tuple(
        one.model_copy(
            update={"damage": measured[f"{one.dim}=0"], "by": "measured"} if one.width == 0 else {"damage": scaled(one)}
        )
        for one in found.widths
    )
    known = tuple(corrections.values())
    return found.model_copy(update={"formats": formats, "widths": widths, "corrections": known})


@dataclass(frozen=True, slots=True)
class _Kind:
    """Large changes that are alike."""

    name: str
    anchors: int  # how many of its choices are measured at most
    prior: float  # how many anchors of a factor of 1 are added to them


def _kind(one: FormatDamage | WidthDamage, layout: Layout) -> _Kind | None:
    """The kind of a large change to a block; None: the second order is good enough."""
    if isinstance(one, FormatDamage):
        few = one.precision.bits < FEW_BITS and one.site not in layout.units  # sites of ends have their unit's name
        return _Kind(f"{one.site} below {FEW_BITS:g} bits", anchors=1, prior=0.0) if few else None
    unit = layout.unit_of_dim(one.dim)
    if one.width in {0, unit.size}:
        return None
    if unit.block in {0, layout.blocks - 1}:
        return _Kind(f"{one.dim} cut", anchors=1, prior=0.0)
    return _Kind(f"{one.dim.rpartition('.')[2]} cut", anchors=ANCHORS, prior=PRIOR)


def _unit_of_site(layout: Layout, site: str) -> Unit:
    return layout.units[site if site in layout.units else site.rpartition(".")[0]]


def _kinds(found: Measurements, layout: Layout) -> dict[_Kind, list[Measured]]:
    """The predicted choices of each kind, those of largest damage first."""
    kinds: defaultdict[_Kind, list[Measured]] = defaultdict(list)
    choices: list[FormatDamage | WidthDamage] = [*found.formats, *found.widths]
    for one in choices:
        if (kind := _kind(one, layout)) is not None and one.damage > 0:
            unit = layout.unit_of_dim(one.dim) if isinstance(one, WidthDamage) else _unit_of_site(layout, one.site)
            kinds[kind].append(Measured(unit=unit, choice=one))
    return {kind: sorted(own, key=lambda one: -one.choice.damage) for kind, own in kinds.items()}


def anchors(choices: list[Measured], most: int) -> Iterator[Measured]:
    """Choices at even steps through the sum of their damage."""
    total, passed, number = sum(one.choice.damage for one in choices), 0.0, 0
    for one in choices:
        passed += one.choice.damage
        if number < most and passed >= (number + 0.5) / most * total:
            yield one
            while number < most and passed >= (number + 0.5) / most * total:
                number += 1
