"""The input of a search method: a problem, as data, and an oracle for the damage of choices and plans."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Generator, Tensor, device

from trimbit.errors import BudgetError
from trimbit.jobs.progress import Reporter, Silent
from trimbit.measure.choices import allowed_formats, allowed_widths, format_of, sites_of
from trimbit.model.forward.logits import Divergence
from trimbit.model.layout import Layout, Unit
from trimbit.model.resolved import resolve
from trimbit.schema.base import Schema
from trimbit.schema.found import Found, Tried
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.measurements import Background, Measurements
from trimbit.schema.objective import Objective, Outcome
from trimbit.schema.plan import ModelRef, Plan, Provenance, Rotation
from trimbit.schema.precision import Precision, Run, row_nbytes
from trimbit.schema.recipe import Measure
from trimbit.schema.space import Space
from trimbit.search.effort import NOTHING, Effort

NO_CHOICE = "the budget is so near the smallest one that it leaves no choice: {}"
C = TypeVar("C", bound=Schema)
In = TypeVar("In", bound=Schema, contravariant=True)


@runtime_checkable
class Channels(Protocol):
    """Figures of the input channels of weights, and of weights rounded along them."""

    def second_moments(self) -> Mapping[str, Sequence[float]]:
        """Diag H of each site's inputs."""

    def salience(self, name: str) -> Sequence[float]:
        """For each input channel of a weight, the sum of w^2 / [H^-1]_jj^2 over its rows."""

    def rounding_error(self, name: str, runs: tuple[Run, ...]) -> float:
        """E |(W - Q) x|^2 of a weight that is rounded to nearest in these runs."""


@runtime_checkable
class Masked(Protocol):
    """The frozen model with a low and a high format in every layer; masks choose one for each channel."""

    device: device  # of masks and their gradients

    def gradients(
        self, masks: Mapping[str, Tensor], step: int, generator: Generator
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss of a step's tokens, in nats a token, for masks of zeros and ones by site, and its gradients.

        All randomness except that of the masks is drawn from the generator.
        """

    def damage(self, masks: Mapping[str, Tensor], rows: int | None = None) -> Divergence:
        """KL to the original and loss, in nats a token, on the first `rows` training rows; None: the held-out ones."""


class Measured(NamedTuple):
    """KL of an applied plan, in nats a token."""

    choose: float  # on the rows for choosing between plans
    report: float  # on rows that nothing is fitted to or chosen by


@runtime_checkable
class Oracle(Protocol):
    """The damage of choices and plans, and the gradients of masks: everything that needs the model."""

    def channels(self) -> Channels:
        """Figures of the input channels of weights."""

    def damage(self, background: Background, number: int) -> Measurements:
        """Damage of every choice in a background; `number` counts the rounds, from 0."""

    def estimate_kl(self, plan: Plan) -> float:
        """KL of a plan assembled from candidates: seconds."""

    def apply_and_measure(self, plan: Plan) -> Measured:
        """KL of a plan applied for real: minutes."""

    def outcomes(self, plans: Sequence[Plan], objective: Objective) -> Iterable[tuple[int, Outcome]]:
        """The index of each plan and the figures that the objective asks for, as they become known."""

    def importance(self) -> Mapping[str, float]:
        """Importance of `blocks.7`, `blocks.7.attn`, ... to the task."""

    def masked(self, config: Any) -> Masked:  # noqa: ANN401
        """The model with two formats in every weight, for gradients."""

    def share_damage(self, config: Any, masks: Mapping[str, Tensor], rows: int) -> float:  # noqa: ANN401
        """KL of the model under masks, kept so that an interrupted search goes on."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One search: find the plan of least damage whose weight files are at most `budget_nbytes`."""

    layout: Layout
    model: ModelRef
    budget_nbytes: int
    space: Space
    rankings: Mapping[str, tuple[int, ...]]  # dim -> its indices, most important first
    recipe: Mapping[str, Any]  # as plain data, for the plan's provenance
    calibration: str
    calibration_digest: str | None
    seed: int
    measure: Measure | None = None
    oracle: Oracle | None = None  # None: for sizes alone
    refits: bool = True  # the out weight of a cut unit gains a bias
    rank: int = 0  # of the low-rank pair of each weight in the blocks
    rotation: Rotation | None = None  # of every plan
    kv_cache: KVPrecision | None = None  # of every plan
    importance: bool = False  # whether the recipe ranks layers
    state: Path | None = None  # folder for the state from which an interrupted search goes on
    reporter: Reporter = field(default_factory=Silent)

    @property
    def costs(self) -> Oracle:
        """The oracle; only a problem for sizes alone has none."""
        assert self.oracle is not None, "this problem is for sizes alone"
        return self.oracle

    def plan(
        self, widths: Mapping[str, int], formats: Mapping[str, Precision], method: str, predicted: float | None = None,
        measurements: str | None = None,
    ) -> Plan:  # fmt: skip
        """The plan that cuts dims to `widths` by their rankings; `formats` are by site or by weight."""
        layout = self.layout
        cuts: dict[str, tuple[int, ...]] = {}
        weights: dict[str, tuple[Run, ...]] = {}
        biases: list[str] = []
        adapters: dict[str, int] = {}
        for unit in layout.units.values():
            width = widths.get(unit.dim, self.space.kept.get(unit.dim, unit.size)) if unit.dim else None
            if unit.dim and width != unit.size:
                cuts[unit.dim] = tuple(sorted(self.rankings[unit.dim][:width]))
                if self.refits and width and unit.out_weight:
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
            calibration_digest=self.calibration_digest, measurement_hash=measurements, seed=self.seed,
            predicted_damage=predicted, measured_damage=None, nbytes=0,
        )  # fmt: skip
        plan = Plan(
            model=self.model, rotation=self.rotation, cuts=cuts, weights=weights, biases=tuple(biases),
            adapters=adapters, kv_cache=self.kv_cache, found_by=found,
        )  # fmt: skip
        return plan.with_provenance(nbytes=resolve(plan, layout).file_nbytes)

    def adapters(self, unit: Unit) -> dict[str, int]:
        """The ranks of the low-rank pairs of a unit's weights."""
        return dict.fromkeys(unit.weights, self.rank) if self.rank and unit.block is not None else {}

    def estimated(self, plans: Sequence[Plan]) -> tuple[Tried, ...]:
        """The estimated KL of each plan; nothing where there is no choice or the recipe measures nothing."""
        if self.measure is None or len(plans) == 1:
            return ()
        return tuple(Tried(plan=plan, estimated_kl=self.costs.estimate_kl(plan)) for plan in plans)

    def best_estimated(self, plans: Sequence[Plan]) -> tuple[Plan, tuple[Tried, ...]]:
        """The plan with the lowest estimated KL, and all plans tried; the first plan if nothing is estimated."""
        tried = self.estimated(plans)
        return (min(tried, key=estimate_of).plan if tried else plans[0]), tried

    def best(self, plans: Sequence[Plan]) -> tuple[Plan, tuple[Tried, ...]]:
        """The plan of least applied KL, and the plans tried; by estimated KL if the recipe applies no finalists.

        The plan's measured damage is on the report rows.
        """
        if self.measure is None or not self.measure.apply_finalists:
            return self.best_estimated(plans)
        found = [self.costs.apply_and_measure(plan) for plan in plans]
        tried = tuple(Tried(plan=plan, applied_kl=own.choose) for plan, own in zip(plans, found, strict=True))
        at = min(range(len(plans)), key=lambda i: found[i].choose)
        return plans[at].with_provenance(measured_damage=found[at].report), tried

    def uniform(self, precision: Precision, method: str) -> Plan:
        """The plan with every weight, the embedding included, in one format, and nothing cut."""
        sites = [site for unit in self.layout.units.values() for site in sites_of(self.layout, unit)]
        return self.plan({}, dict.fromkeys(sites, precision), method)

    def smallest(self) -> Plan:
        """The plan of fewest bytes in the space."""
        layout = self.layout
        widths, formats = {}, {}
        for unit in layout.units.values():
            if unit.dim and (least := min(allowed_widths(layout, unit, self.space))) != unit.size:
                widths[unit.dim] = least
            for site, names in sites_of(layout, unit).items():
                cols = layout.weights[names[0]].cols
                sizes = {p: row_nbytes((Run(count=cols, precision=p),)) for p in allowed_formats(unit, self.space)}
                formats[site] = min(sizes, key=sizes.__getitem__)
        return self.plan(widths, formats, "smallest")

    def require_feasible(self, smallest: Plan) -> None:
        """Refuse a budget below the smallest plan.

        Raises:
            BudgetError: naming the smallest feasible budget.
        """
        need = smallest.found_by.nbytes
        if need > self.budget_nbytes:
            raise BudgetError(
                f"the budget of {self.budget_nbytes:,} bytes is below the smallest model that this recipe can make; "
                f"the smallest feasible budget is {need:,} bytes (--budget {need}B)"
            )


def estimate_of(one: Tried) -> float:
    """The estimated KL of a plan that has one."""
    assert one.estimated_kl is not None
    return one.estimated_kl


@runtime_checkable
class Search(Protocol[In]):
    """Finds a plan within the problem's budget."""

    def __call__(self, problem: Problem, config: In) -> Found:
        """Search."""


@runtime_checkable
class RequireFeasible(Protocol[In]):
    """Refuses early a budget or a recipe that the method cannot serve."""

    def __call__(self, problem: Problem, config: In) -> None:
        """Check."""


@runtime_checkable
class DefaultNbytes(Protocol[In]):
    """Bytes of the weight files if no budget is given."""

    def __call__(self, problem: Problem, config: In) -> int:
        """Bytes."""


@runtime_checkable
class Cost(Protocol[In]):
    """Counts what a search will ask for, from a problem for sizes alone."""

    def __call__(self, problem: Problem, config: In) -> Effort:
        """Count."""


@dataclass(frozen=True, kw_only=True)
class SearchMethod(Generic[C]):
    """What a module in `search/methods/` offers, as `METHOD`; mypy checks each field against the module's `Config`."""

    paper: str
    config: type[C]
    search: Search[C]
    require_feasible: RequireFeasible[C]
    cost: Cost[C] | None = None  # None: it asks the oracle for nothing
    default_nbytes: DefaultNbytes[C] | None = None  # None: a budget is required
    needs: tuple[str, ...] = ()  # required fields of the recipe
    reads_moments: bool = False  # for figures of the channels
    measures_damage: bool = False  # asks for the damage of every choice
    draws: bool = False  # its result comes with a picture
    objective: Callable[[C], Objective] | None = None  # of a search over whole plans
    result_fields: Callable[[C], dict[str, Any]] | None = None  # fields that decide the result; None: all

    def effort(self, problem: Problem, config: C) -> Effort:
        """What a search will ask for."""
        return self.cost(problem, config) if self.cost else NOTHING

    def fields(self, config: C) -> dict[str, Any]:
        """The fields of a configuration that decide the result, for a content key."""
        return self.result_fields(config) if self.result_fields else config.model_dump(mode="json")
