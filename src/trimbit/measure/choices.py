"""What a search may choose for each unit: widths, and formats by site."""

from collections.abc import Mapping

from trimbit.errors import PlanError
from trimbit.model.layout import Layout, Unit
from trimbit.schema.base import digest
from trimbit.schema.measurements import Background
from trimbit.schema.plan import Plan
from trimbit.schema.precision import Precision
from trimbit.schema.space import Space


def allowed_widths(layout: Layout, unit: Unit, space: Space) -> tuple[int, ...]:
    """The widths that a unit may have, the full one first."""
    if unit.dim is None:
        return ()
    if space.kept:
        return (space.kept.get(unit.dim, unit.size),)
    if unit.name.endswith(".attn"):
        return tuple(range(unit.size, -1, -1)) if space.prune_kv_groups else (unit.size,)
    step = min(space.channel_multiple, unit.size)
    kept = {round(share * unit.size / step) * step if share < 1 else unit.size for share in space.widths}
    return tuple(sorted(kept | {unit.size}, reverse=True))


def sites_of(layout: Layout, unit: Unit) -> dict[str, tuple[str, ...]]:
    """The sites of a unit and the weights that read each: these share a format."""
    sites: dict[str, list[str]] = {}
    for name in unit.weights:
        sites.setdefault(layout.weights[name].site if unit.block is not None else unit.name, []).append(name)
    return {site: tuple(names) for site, names in sites.items()}


def format_of(formats: Mapping[str, Precision], site: str, name: str) -> Precision:
    """A weight's own format, where it has one, else its site's."""
    return formats[name] if name in formats else formats[site]


def allowed_formats(unit: Unit, space: Space) -> tuple[Precision, ...]:
    """The formats that a unit's sites may have."""
    if unit.block is None:
        return space.embedding_formats
    spared = spared_format(unit, space)
    return space.formats if spared is None else (spared,)


def spared_format(unit: Unit, space: Space) -> Precision | None:
    """The format of a unit that is fixed before the search, if it is."""
    return space.spared_format if unit.block in space.spared else None


def cut_name(unit: Unit, width: int, rankings: Mapping[str, tuple[int, ...]]) -> str:
    """A name of a cut that says which members of the dim are kept."""
    if width in {0, unit.size}:
        return f"{unit.dim}={width}"
    assert unit.dim is not None
    return f"{unit.dim}={width}:{digest(sorted(rankings[unit.dim][:width]))}"


def reference_width(unit: Unit, background: Background) -> int | None:
    """The width at which a unit's formats are measured: the background's, or the full one where that drops the unit."""
    if unit.dim is None:
        return None
    return background.widths.get(unit.dim, unit.size) or unit.size


def background_of(plan: Plan, layout: Layout) -> Background:
    """The widths and formats of a plan whose weights have one run each.

    Raises:
        PlanError: if a weight has several runs, or a site has an order or rounded inputs.
    """
    if odd := [*plan.orders, *plan.acts]:
        raise PlanError(f"site {odd[0]} has an order or rounded inputs; plans with such sites cannot be tried here")
    formats: dict[str, Precision] = {}
    for name, weight in layout.weights.items():
        unit = layout.units[weight.unit]
        runs = plan.weights.get(name)
        if runs is not None and len(runs) != 1:
            raise PlanError(f"weight {name} has {len(runs)} runs; only plans with one run a weight can be tried here")
        site = weight.site if unit.block is not None else unit.name
        own = (runs or next(iter(plan.weights.values())))[0].precision  # of a sub-block that is gone: any
        if formats.setdefault(site, own) != own:
            formats[name] = own
    return Background(widths=plan.widths, formats=formats)
