"""Measure the damage of every choice: the KL of the whole model with one thing changed, in the background of a plan.

Each result is appended to a journal, so that an interrupted measurement goes on where it stopped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from trimbit.jobs.journal import Journal
from trimbit.jobs.progress import Progress
from trimbit.measure.choices import allowed_formats, allowed_widths, cut_name, reference_width, sites_of
from trimbit.measure.kl_probe import KLProbe
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.model.layout import Layout, Unit
from trimbit.schema.measurements import Background, FormatDamage, Measurements, WidthDamage
from trimbit.schema.plan import ModelRef
from trimbit.schema.precision import Precision
from trimbit.schema.space import Space


@runtime_checkable
class Candidates(Protocol):
    """What gives the weights of a choice, in full shape, with what is cut set to zero."""

    rankings: Mapping[str, tuple[int, ...]]

    def unit_state(self, unit: Unit, width: int | None, formats: Mapping[str, Precision]) -> dict[str, Tensor]:
        """Parameters of a unit by name, in `formats` by site, or by weight."""


def install(whole: InMemoryModel, layout: Layout, candidates: Candidates, plan: Background) -> None:
    """Put the candidates of a whole plan into the model."""
    for unit in layout.units.values():
        whole.install(candidates.unit_state(unit, plan.widths.get(unit.dim or "", unit.size), plan.formats))


def measure(
    probe: KLProbe, layout: Layout, candidates: Candidates, space: Space, background: Background, path: Path,
    model: ModelRef, data_digest: str, seed: int, progress: Progress,
) -> Measurements:  # fmt: skip
    """Measure every format of every site and every width of every dim, one at a time, in the background.

    The journal at `path` knows changes by what they do, so that other spaces and rankings share it.
    """
    whole = probe.whole
    journal = Journal(path)
    known: dict[str, float] = {entry["change"]: entry["damage"] for entry in journal.read()}
    every = changes(layout, space, background, candidates.rankings)
    missing = [change for change in every if change.key not in known]
    if missing or "background" not in known:
        install(whole, layout, candidates, background)
        probe.refresh()
        base = probe.damage(None)
        if "background" not in known:
            journal.append({"change": "background", "damage": base})
            known["background"] = base
        done = len(every) - len(missing)
        progress(done, len(every))  # the time left is that of the choices alone
        for at, (unit, key, width, formats) in enumerate(missing, start=done + 1):
            state = candidates.unit_state(unit, width, formats)
            before = whole.current(tuple(state))
            whole.install(state)
            known[key] = probe.damage(unit.block) - base
            whole.install(before)
            journal.append({"change": key, "damage": known[key]})
            progress(at, len(every))
    return Measurements(
        model=model, data_digest=data_digest, seed=seed, background=background, background_damage=known["background"],
        rankings=dict(candidates.rankings),
        formats=tuple(_formats(layout, space, background, candidates.rankings, known)),
        widths=tuple(_widths(layout, space, candidates.rankings, known)),
    )  # fmt: skip


class Change(NamedTuple):
    """One thing that is changed: a unit, the journal's name of the change, and the width and formats of its sites."""

    unit: Unit
    key: str
    width: int | None
    formats: dict[str, Precision]


def changes(
    layout: Layout, space: Space, background: Background, rankings: Mapping[str, tuple[int, ...]]
) -> list[Change]:
    """All single changes of a background."""
    return [change for unit in layout.units.values() for change in _changes(layout, unit, space, background, rankings)]


def _changes(
    layout: Layout, unit: Unit, space: Space, background: Background, rankings: Mapping[str, tuple[int, ...]]
) -> list[Change]:
    """All single changes of a unit."""
    base = {site: background.formats[site] for site in sites_of(layout, unit)}
    width = reference_width(unit, background)
    found: list[Change] = []
    for site, precision in base.items():
        others = (other for other in allowed_formats(unit, space) if other != precision)
        found += [Change(unit, f"{site}={other.name}", width, {**base, site: other}) for other in others]
    here = background.widths.get(unit.dim or "", unit.size)
    widths = (width for width in allowed_widths(layout, unit, space) if width != here)
    return [*found, *(Change(unit, cut_name(unit, width, rankings), width, base) for width in widths)]


def _formats(
    layout: Layout,
    space: Space,
    background: Background,
    rankings: Mapping[str, tuple[int, ...]],
    known: Mapping[str, float],
) -> list[FormatDamage]:
    found = []
    for unit in layout.units.values():
        # the formats of a unit that the background drops were measured with it put back
        put_back = known[cut_name(unit, unit.size, rankings)] if background.widths.get(unit.dim or "") == 0 else 0.0
        for site in sites_of(layout, unit):
            for precision in dict.fromkeys((*allowed_formats(unit, space), background.formats[site])):
                same = precision == background.formats[site]
                damage = 0.0 if same else known[f"{site}={precision.name}"] - put_back
                found.append(FormatDamage(site=site, precision=precision, damage=damage))
    return found


def _widths(
    layout: Layout, space: Space, rankings: Mapping[str, tuple[int, ...]], known: Mapping[str, float]
) -> list[WidthDamage]:
    return [
        WidthDamage(dim=unit.dim, width=width, damage=known.get(cut_name(unit, width, rankings), 0.0))
        for unit in layout.units.values()
        if unit.dim is not None
        for width in allowed_widths(layout, unit, space)
    ]
