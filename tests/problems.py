"""Search problems on a tiny llama with invented, additive damage: no model is run."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tiny import tiny_config
from trimbit.measure.choices import allowed_formats, allowed_widths, reference_width, sites_of
from trimbit.model.build import build_layout
from trimbit.model.resolved import resolve
from trimbit.schema.measurements import Background, FormatDamage, Measurements, WidthDamage
from trimbit.schema.objective import Objective, Outcome
from trimbit.schema.plan import ModelRef, Plan
from trimbit.schema.precision import Precision, parse_precision
from trimbit.schema.recipe import Measure
from trimbit.schema.space import Space
from trimbit.search.problem import Measured, Problem

REF = ModelRef(id="tiny", config_hash="0", weights_hash="0")
LAYOUT = build_layout(tiny_config("llama"))


def formats(*names: str) -> tuple[Precision, ...]:
    return tuple(parse_precision(name) for name in names)


SPACE = Space(
    formats=formats("uint2g32", "int3row", "int4g32", "uint8row"),
    embedding_formats=formats("uint2g32", "int4g32", "uint8row"),
    widths=(1.0, 0.5, 0.0),
    prune_kv_groups=True,
    channel_multiple=16,
)


def of_format(site: str, precision: Precision) -> float:
    """A quarter of the damage for each further bit; sites differ up to elevenfold; a group a row is worse."""
    weight = 1 + zlib.crc32(site.encode()) % 11
    return weight * 4.0**-precision.bits * (1.5 if precision.name.endswith("row") else 1.0)


def of_width(dim: str, width: int) -> float:
    """Grows with the square of what is cut, up to 0.05 times the dim's weight."""
    size = LAYOUT.unit_of_dim(dim).size
    return 0.05 * (1 + zlib.crc32(dim.encode()) % 7) * ((size - width) / size) ** 2


def additive(plan: Plan, *, width_damage: Callable[[str, int], float] = of_width) -> float:
    """The damage of a whole plan as the search models it, in a background that cuts nothing."""
    total = 0.0
    for own in resolve(plan, LAYOUT).units.values():
        unit = own.origin
        share = 1.0 if own.width is None else own.width / unit.size
        total += 0.0 if own.width is None else width_damage(unit.dim, own.width)
        for site, names in sites_of(LAYOUT, unit).items() if share else ():
            total += share * of_format(site, plan.weights[names[0]][0].precision)
    return total


def measurements(
    space: Space = SPACE,
    width_damage: Callable[[str, int], float] = of_width,
    widths: Mapping[str, int] | None = None,
) -> Measurements:
    sites = {site: unit for unit in LAYOUT.units.values() for site in sites_of(LAYOUT, unit)}
    background = Background(
        widths=dict(widths or {}), formats={site: allowed_formats(unit, space)[-1] for site, unit in sites.items()}
    )
    share = {unit.name: (reference_width(unit, background) or 1) / (unit.size or 1) for unit in sites.values()}
    return Measurements(
        model=REF,
        data_digest="0",
        seed=0,
        background=background,
        background_damage=0.0,
        rankings={unit.dim: tuple(range(unit.size)) for unit in LAYOUT.units.values() if unit.dim},
        formats=tuple(
            FormatDamage(site=site, precision=p, damage=share[unit.name] * of_format(site, p))
            for site, unit in sites.items()
            for p in allowed_formats(unit, space)
        ),
        widths=tuple(
            WidthDamage(dim=unit.dim, width=width, damage=width_damage(unit.dim, width))
            for unit in LAYOUT.units.values()
            if unit.dim
            for width in allowed_widths(LAYOUT, unit, space)
        ),
    )


@dataclass(frozen=True)
class Figures:
    """Invented figures of channels."""

    second_moments: Callable[..., Any] = dict
    salience: Callable[..., Any] = list
    rounding_error: Callable[..., Any] = float


@dataclass(frozen=True)
class Invented:
    """An oracle of invented figures; what a test does not give must not be asked for."""

    measurements: Measurements
    evaluate: Callable[[Plan], float] | None = None
    trial: Callable[[Plan], float] | None = None
    outcome: Callable[[Plan], Outcome] | None = None
    figures: Any = None
    masks: Any = None
    layers: Mapping[str, float] | None = None

    def damage(self, background: Background, number: int) -> Measurements:
        return self.measurements

    def channels(self) -> Any:
        return self.figures

    def estimate_kl(self, plan: Plan) -> float:
        return self.evaluate(plan)

    def apply_and_measure(self, plan: Plan) -> Measured:
        kl = self.trial(plan)
        return Measured(choose=kl, report=kl + REPORTED)

    def outcomes(self, plans: Sequence[Plan], objective: Objective) -> Iterable[tuple[int, Outcome]]:
        return enumerate(map(self.outcome, plans))

    def importance(self) -> Mapping[str, float]:
        return self.layers

    def masked(self, config: Any) -> Any:
        return self.masks

    def share_damage(self, config: Any, masks: Mapping[str, Tensor], rows: int) -> float:
        return self.masks.damage(masks, rows).kl


REPORTED = 0.01  # that KL on the report rows is larger by
ORACLE = {"evaluate", "trial", "outcome", "figures", "masks", "layers"}


def problem(budget_nbytes: int, **fields: Any) -> Problem:
    """A problem whose oracle has the given figures; it measures plans only where a test says how."""
    space = fields.setdefault("space", SPACE)
    found = fields.pop("measurements", None) or measurements(space)
    given = {name: fields.pop(name) for name in ORACLE & fields.keys()}
    oracle = Invented(measurements=found, **given)
    if oracle.evaluate is None:
        oracle = replace(oracle, evaluate=lambda plan: plan.found_by.predicted_damage or 1e9)
    measure = Measure(rows=1, length=16, apply_finalists=oracle.trial is not None)
    return Problem(
        layout=LAYOUT,
        model=REF,
        budget_nbytes=budget_nbytes,
        rankings=found.rankings,
        recipe={},
        calibration="self",
        calibration_digest=None,
        seed=0,
        measure=fields.pop("measure", measure),
        oracle=oracle,
        importance=oracle.layers is not None,
        **fields,
    )
