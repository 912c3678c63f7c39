"""The damage of leaving out each sub-block, measured: the second order says too little of so large a change."""

from collections.abc import Mapping
from pathlib import Path

import torch

from trimbit.jobs.journal import Journal
from trimbit.jobs.progress import Progress
from trimbit.measure.choices import allowed_widths
from trimbit.measure.kl_probe import KLProbe
from trimbit.model.layout import Layout
from trimbit.schema.measurements import Measurements
from trimbit.schema.space import Space


def measure_removals(
    probe: KLProbe, layout: Layout, space: Space, path: Path, progress: Progress
) -> dict[str, float]:  # fmt: skip
    """KL of the dense model without each sub-block that may go, by its dim; kept in the journal at `path`."""
    journal = Journal(path)
    known: dict[str, float] = {entry["dim"]: entry["damage"] for entry in journal.read()}
    units = [unit for unit in layout.units.values() if 0 in allowed_widths(layout, unit, space)]
    missing = [unit for unit in units if unit.dim not in known]
    for done, unit in enumerate(missing, start=len(units) - len(missing) + 1):
        assert unit.dim is not None
        names = (f"{unit.out_weight}.weight", f"{unit.out_weight}.bias")
        before = probe.whole.current(names)
        probe.whole.install({name: torch.zeros_like(own) for name, own in before.items()})
        known[unit.dim] = probe.damage(unit.block)
        probe.whole.install(before)
        journal.append({"dim": unit.dim, "damage": known[unit.dim]})
        progress(done, len(units))
    return known


def with_measured(found: Measurements, removals: Mapping[str, float]) -> Measurements:
    """Predicted damage with that of whole sub-blocks as measured."""
    widths = (
        one.model_copy(update={"damage": removals[one.dim], "by": "measured"}) if one.width == 0 else one
        for one in found.widths
    )
    return found.model_copy(update={"widths": tuple(widths)})
