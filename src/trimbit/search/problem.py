"""What a search method is given: the layout, the budget, the space, the measurements, and a way to try a plan."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Generator, Tensor, device

from trimbit.errors import BudgetError
from trimbit.jobs.progress import Reporter, Silent
from trimbit.measure.choices import allowed_formats, allowed_widths, format_of, sites_of
from trimbit.model.forward.logits import Divergence
from trimbit.model.layout import Layout, Unit
from trimbit.schema.base import Schema
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.measurements import Measurements
from trimbit.schema.objective import Outcome
from trimbit.schema.plan import ModelRef, Plan, Provenance, Rotation
from trimbit.schema.precision import Precision, Run
from trimbit.schema.space import Space

Evaluate = Callable[[Plan], float]
Outcomes = Callable[[Sequence[Plan]], Iterable[tuple[int, Outcome]]]


@runtime_checkable
class Method(Protocol):
    """A search module."""

    @property
    def PAPER(self) -> str: ...  # noqa: N802, D102
    @property
    def NEEDS(self) -> tuple[str, ...]: ...  # noqa: N802, D102
    @property
    def Config(self) -> type[Schema]: ...  # noqa: N802, D102
    def search(self, problem: "Problem", config: Schema) -> Plan: ...  # noqa: D102


@runtime_checkable
class Channels(Protocol):
    """Figures of the input channels of weights, and of weights rounded along them."""

    def second_moments(self) -> Mapping[str, Sequence[float]]:
        """Diag H of each site's inputs."""

    def salience(self, name: str) -> Sequence[float]:
        """Of each input channel of a weight: the sum of w^2 / [H^-1]_jj^2 over its rows."""

    def rounding_error(self, name: str, runs: tuple[Run, ...]) -> float:
        """E |(W - Q) x|^2 of a weight that is rounded to nearest in these runs."""


@runtime_checkable
class Masked(Protocol):
    """The frozen model with a low and a high format in every layer, of which masks choose for each channel."""

    device: device  # that masks and their gradients are wanted on

    def gradients(
        self, masks: Mapping[str, Tensor], step: int, generator: Generator
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss of a step's tokens, in nats a token, for masks of zeros and ones by site, and its gradients.

        What is left to chance, beside the masks, is drawn from the generator.
        """

    def damage(self, masks: Mapping[str, Tensor], rows: int | None = None) -> Divergence:
        """KL to the original and loss, in nats a token, on the first rows that are learnt from; None: held-out ones."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One search: find the plan of least damage whose weight files are at most `limit` bytes."""

    layout: Layout
    model: ModelRef
    limit: int
    space: Space
    rankings: Mapping[str, tuple[int, ...]]
    recipe: Mapping[str, Any]  # and the text, for the plan to tell
    calibration: str
    seed: int
    measurements: Measurements | None = None
    measurement_hash: str | None = None
    evaluate: Evaluate | None = None  # quick: KL of a plan put together from what was quantised alone
    trial: Evaluate | None = None  # real: KL of the plan as it is applied
    outcomes: Outcomes | None = None  # of plans, each with its place among them, as it becomes known
    channels: "Channels | None" = None  # what is known of the weights' input channels
    masked: "Callable[[Any], Masked] | None" = None  # the model with two formats in every weight, for gradients
    importance: Callable[[], Mapping[str, float]] | None = None  # of `blocks.7`, `blocks.7.attn`, ... to the task
    journal: Path | None = None  # of trials or steps, for a search that may be broken off and go on
    key: str = ""  # content key of all that decides a trial's or a step's result
    reporter: Reporter = field(default_factory=Silent)
    refit_biases: bool = True  # a cut unit's out weight gains a bias
    rank: int = 0  # of the low-rank pair beside each weight of the blocks
    rotation: Rotation | None = None  # of every plan
    kv_cache: KVPrecision | None = None  # of every plan

    def plan(
        self, widths: Mapping[str, int], formats: Mapping[str, Precision], method: str, predicted: float | None = None,
        notes: tuple[str, ...] = (),
    ) -> Plan:  # fmt: skip
        """The plan that keeps `widths` of the cut dims by their rankings; `formats` are by site, or by weight."""
        layout = self.layout
        cuts: dict[str, tuple[int, ...]] = {}
        weights: dict[str, tuple[Run, ...]] = {}
        biases: list[str] = []
        adapters: dict[str, int] = {}
        for unit in layout.units.values():
            width = widths.get(unit.dim, self.space.kept.get(unit.dim, unit.size)) if unit.dim else None
            if unit.dim and width != unit.size:
                cuts[unit.dim] = tuple(sorted(self.rankings[unit.dim][:width]))
                if self.refit_biases and width and unit.out_weight:
                    biases.append(unit.out_weight)
            if unit.dim and width == 0:
                continue
            adapters |= self.adapters(unit)
            for site, names in sites_of(layout, unit).items():
                for name in names:
                    cols = layout.weight_shape(layout.weights[name], width)[1]
                    weights[name] = (Run(count=cols, precision=format_of(formats, site, name)),)
        found = Provenance(
            method=method, recipe=dict(self.recipe), calibration=self.calibration,
            measurement_hash=self.measurement_hash, seed=self.seed,
            predicted_damage=predicted, measured_damage=None, nbytes=0, notes=notes,
        )  # fmt: skip
        plan = Plan(
            model=self.model, rotation=self.rotation, cuts=cuts, weights=weights, biases=tuple(biases),
            adapters=adapters, kv_cache=self.kv_cache, found_by=found,
        )  # fmt: skip
        return plan.with_provenance(nbytes=layout.file_nbytes(plan))

    def adapters(self, unit: Unit) -> dict[str, int]:
        """The ranks of the low-rank pairs of a unit's weights."""
        return dict.fromkeys(unit.weights, self.rank) if self.rank and unit.block is not None else {}

    def quick_best(self, plans: Sequence[Plan]) -> tuple[Plan, tuple[str, ...]]:
        """The plan of least quick KL, and a note about each; the first where there is no choice or nothing can tell."""
        if self.evaluate is None or len(plans) == 1:
            return plans[0], ()
        found = [self.evaluate(plan) for plan in plans]
        notes = (f"quick, {p.found_by.method}: {damage:.4f} nats" for p, damage in zip(plans, found, strict=True))
        return plans[found.index(min(found))], tuple(notes)

    def best(self, plans: Sequence[Plan]) -> tuple[Plan, tuple[str, ...]]:
        """The plan of least real KL, which it then tells, and a note about each; of least quick KL without trials."""
        if self.trial is None:
            return self.quick_best(plans)
        found = [self.trial(plan) for plan in plans]
        notes = (f"applied, {p.found_by.method}: {damage:.4f} nats" for p, damage in zip(plans, found, strict=True))
        best = plans[found.index(min(found))]
        return best.with_provenance(measured_damage=min(found)), tuple(notes)

    def uniform(self, precision: Precision, method: str) -> Plan:
        """Every weight, the embedding included, in one format, nothing cut."""
        sites = [site for unit in self.layout.units.values() for site in sites_of(self.layout, unit)]
        return self.plan({}, dict.fromkeys(sites, precision), method)

    def smallest(self) -> Plan:
        """The plan of fewest bytes in the space."""
        layout = self.layout
        widths, formats = {}, {}
        for unit in layout.units.values():
            if unit.dim:
                widths[unit.dim] = min(allowed_widths(layout, unit, self.space))
            for site, names in sites_of(layout, unit).items():
                weight = layout.weights[names[0]]
                formats[site] = min(
                    allowed_formats(unit, self.space),
                    key=lambda p: sum(
                        spec.nbytes
                        for spec in layout.weight_tensors(
                            weight, (Run(count=weight.cols, precision=p),), None, bias=False
                        ).values()
                    ),
                )
        return self.plan(
            {dim: width for dim, width in widths.items() if width != layout.unit_of_dim(dim).size}, formats, "smallest"
        )

    def require_feasible(self, smallest: Plan) -> None:
        """Refuse a budget below the smallest plan.

        Raises:
            BudgetError: naming the smallest feasible budget.
        """
        need = smallest.found_by.nbytes
        if need > self.limit:
            raise BudgetError(
                f"the budget of {self.limit:,} bytes is below the smallest model that this recipe can make; "
                f"the smallest feasible budget is {need:,} bytes (--budget {need}B)"
            )
