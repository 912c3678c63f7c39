"""Choose a width and formats for every unit under the budget, exactly, from the damage of each choice.

Bytes add up over the units, so this is a multiple-choice knapsack, solved by HiGHS. Damage of a choice:
D(width) + (width / width measured at) * sum over its sites of D(format). That damage adds up is only a model, so
several plans are solved for, at several prices, and put together quickly; the best that prunes and the best that does
not are then applied for real, unless one of them is clearly worse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from pydantic import PositiveInt

from trimbit.measure.choices import (
    allowed_formats,
    allowed_widths,
    background_of,
    reference_width,
    sites_of,
    spared_format,
)
from trimbit.model.layout import Unit, header_bound
from trimbit.model.resolved import resolve_unit
from trimbit.schema.base import digest
from trimbit.schema.found import Found, Tried
from trimbit.schema.measurements import Background, Measurements
from trimbit.schema.plan import Plan
from trimbit.schema.precision import Int, Precision, Run
from trimbit.schema.structure import Structure
from trimbit.search.effort import Effort
from trimbit.search.prices import Prices, descend, kinds_of
from trimbit.search.problem import NO_CHOICE, Problem, SearchMethod, estimate_of
from trimbit.search.solvers import knapsack as solver
from trimbit.search.solvers.knapsack import knapsack

NO_PRUNING = "knapsack, no pruning"
CUT = 0.1  # ours: share of the sub-blocks that a further plan cuts in a format not measured
CLOSE = 1.15  # ours: plans without pruning whose estimated KL is larger by more than this factor are not followed
NEAR = 1.03  # ours: likewise, a second plan is not applied
NEAR_LOSSLESS = Int(bits=6, group=64, symmetric=False)  # errors measured one at a time add up best here


class Config(solver.Config):
    """The plans to try, and the background of the damage."""

    plans: PositiveInt = 12  # ours: solved for at most, at several prices
    prune: bool = True  # try plans that prune
    no_pruning: bool = True  # also try plans that prune nothing
    # ours: format of all blocks while a choice's damage is measured; None: the uniform plan nearest to the budget
    background: Precision | None = NEAR_LOSSLESS
    embedding_bits: int = 4  # ours: the embedding and the head suffer more from rounding than a block's weights


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a unit: its kept width (None: it has no dim), the formats of its sites, bytes, damage and cost.

    The cost is the damage plus the price of pruning; the solver minimises it.
    """

    unit: Unit
    width: int | None
    formats: tuple[tuple[str, Precision], ...]
    nbytes: int
    damage: float
    cost: float


def search(problem: Problem, config: Config) -> Found:
    """The best plan over all rounds; the plan of each round is the background of the next.

    Raises:
        BudgetError: if nothing in the space fits; names the smallest feasible budget.
    """
    assert problem.measure is not None, "the knapsack needs measurements"
    require_feasible(problem, config)
    around, rounds = background(problem, config), []
    for number in range(problem.measure.rounds):
        rounds.append(best_of(problem, config, problem.costs.damage(around, number)))
        around = background_of(rounds[-1].plan, problem.layout)
    if len(rounds) == 1:
        return rounds[0]
    plan, tried = problem.best([found.plan for found in rounds])
    best = next(found for found in rounds if found.plan.content == plan.content)
    return best.model_copy(update={"tried": (*(one for found in rounds for one in found.tried), *tried)})


def best_of(problem: Problem, config: Config, damage: Measurements) -> Found:
    """The best of the plans with pruning and the plans without."""
    tries = Tries(problem, config, damage)
    if config.plans == 1 and not (config.prune and config.no_pruning):
        plans = tries.solved(Prices(), prune=config.prune)
    else:
        estimated = tries.estimated()
        plans = finalists(estimated) if estimated else []
    if not plans:  # the bound on the header leaves no room
        plans = [problem.smallest().with_provenance(notes=(NO_CHOICE.format("the smallest plan"),))]
    assert problem.measure is not None
    best, applied = problem.best(plans if problem.measure.apply_finalists else plans[:1])
    tried = (*tries.tried.values(), *applied)
    return Found(plan=best, tried=tried, corrections=damage.corrections, gap=tries.gaps.get(best.content))


class Tries:
    """Plans that are solved for at several prices, by content, and their estimated KL."""

    def __init__(self, problem: Problem, config: Config, damage: Measurements) -> None:
        self.problem, self.config, self.damage = problem, config, damage
        self.gaps: dict[str, float | None] = {}
        self.tried: dict[str, Tried] = {}

    def estimated(self) -> list[Tried]:
        """Plans that prune, and plans that do not: unless these are far behind, at several prices, too."""
        config, asked = self.config, (True,) * self.config.prune + (False,) * self.config.no_pruning
        for prune in asked:
            kl, kinds = partial(self.kl, prune=prune), kinds_of(self.problem, prune=prune)
            best = min(map(estimate_of, self.tried.values()), default=float("inf"))
            descend(kinds if kl(Prices()) <= CLOSE * best else (), kl, config.plans)
        return list(self.tried.values())

    def kl(self, prices: Prices, *, prune: bool) -> float:
        """The estimated KL of the plan at some prices; infinite if none fits."""
        for plan in self.solved(prices, prune=prune):
            if plan.content not in self.tried:
                self.tried[plan.content] = Tried(plan=plan, estimated_kl=self.problem.costs.estimate_kl(plan))
            return estimate_of(self.tried[plan.content])
        return float("inf")

    def solved(self, prices: Prices, *, prune: bool) -> list[Plan]:
        """The plan at some prices; none if nothing fits."""
        found = solve(self.problem, self.config, self.damage, prices, prune=prune)
        if found is None:
            return []
        plan, gap = found
        self.gaps.setdefault(plan.content, gap)
        return [plan]


def finalists(estimated: Sequence[Tried]) -> list[Plan]:
    """The best plan that prunes and the best that does not, best first; one that is far behind is left out."""
    first, *others = sorted(estimated, key=estimate_of)
    second = next((one for one in others if bool(one.plan.cuts) != bool(first.plan.cuts)), None)
    if second is None or estimate_of(second) > NEAR * estimate_of(first):
        return [first.plan]
    return [first.plan, second.plan]


def cost(problem: Problem, config: Config) -> Effort:
    """The damage of every choice in each round, and the plans tried after it."""
    assert problem.measure is not None, "the knapsack needs measurements"
    rounds, around = problem.measure.rounds, background(problem, config)
    tried = sum(
        min(config.plans, 1 + 2 * len(kinds_of(problem, prune=prune)))
        for prune, asked in ((True, config.prune), (False, config.no_pruning))
        if asked
    )
    pruned = (tried if config.prune else 0) * (len(kinds_of(problem, prune=True)) > 1)
    return Effort(
        damage_rounds=rounds, background=around, solved=rounds * tried, assembled=rounds * tried if tried > 1 else 0,
        cut=rounds * CUT * pruned, applied=rounds if problem.measure.apply_finalists else 0,
    )  # fmt: skip


def require_feasible(problem: Problem, config: Config) -> None:
    """Refuse early a budget below the smallest plan in the space.

    Raises:
        BudgetError: naming the smallest feasible budget.
    """
    problem.require_feasible(problem.smallest())


def background(problem: Problem, config: Config) -> Background:
    """The background of measurements: one format for all blocks, by default one that loses next to nothing.

    Embedding and head take the format of their menu nearest in bits to the blocks', or to `embedding_bits` if larger.
    """
    layout = problem.layout
    blocks = config.background
    if blocks is None:
        sizes = {p: problem.uniform(p, "background").found_by.nbytes for p in problem.space.formats}
        blocks = min(sizes, key=lambda p: abs(sizes[p] - problem.budget_nbytes))
    want = max(blocks.bits, config.embedding_bits)
    embedding = min(problem.space.embedding_formats, key=lambda p: (abs(p.bits - want), p.name))
    formats: dict[str, Precision] = {}
    for unit in layout.units.values():
        own = embedding if unit.block is None else spared_format(unit, problem.space) or blocks
        formats |= dict.fromkeys(sites_of(layout, unit), own)
    return Background(widths=problem.space.kept, formats=formats)


def _room_nbytes(problem: Problem) -> int:
    """The part of the budget left for the units."""
    layout = problem.layout
    return (
        problem.budget_nbytes
        - header_bound(layout, problem.rank)
        - sum(2 * int(np.prod(layout.shapes[name])) for name in layout.fixed)
    )


def solve(
    problem: Problem, config: Config, damage: Measurements, prices: Prices, *, prune: bool = True
) -> tuple[Plan, float | None] | None:  # fmt: skip
    """The knapsack's optimum at some prices, of full widths only unless it may prune, and its proven gap.

    None if nothing fits.
    """
    layout = problem.layout
    groups = [pareto(choices(problem, damage, unit, prices, prune=prune)) for unit in layout.units.values()]
    solved = knapsack([[(c.nbytes, c.cost) for c in group] for group in groups], _room_nbytes(problem), config)
    if solved is None:
        return None
    chosen = [group[at] for group, at in zip(groups, solved.picked, strict=True)]
    widths = {
        c.unit.dim: c.width for c in chosen if c.unit.dim is not None and c.width is not None and c.width != c.unit.size
    }
    formats = {site: precision for c in chosen for site, precision in c.formats}
    method = ", ".join(one for one in ("knapsack" if widths else NO_PRUNING, str(prices)) if one)
    predicted = damage.background_damage + sum(c.damage for c in chosen)
    plan = problem.plan(widths, formats, method, predicted, digest(damage.model_dump(mode="json")))
    return plan, solved.gap


def choices(
    problem: Problem, damage: Measurements, unit: Unit, prices: Prices, *, prune: bool = True
) -> list[Choice]:  # fmt: skip
    """All choices of a unit: every width times every combination of formats of its sites."""
    layout, space, dim = problem.layout, problem.space, unit.dim
    by_format = {(m.site, m.precision.name): m.damage for m in damage.formats}
    by_width = {(m.dim, m.width): m.damage for m in damage.widths}
    sites = sites_of(layout, unit)
    found: list[Choice] = []
    for width in allowed_widths(layout, unit, space) or (None,):
        cut = width is not None and width != unit.size
        if cut and not prune and not space.kept:
            continue
        shape = by_width[dim or "", width] if width is not None else 0.0
        price = shape * (prices.of_width(dim) if cut and dim is not None and shape > 0 else 1.0)  # a gain has no price
        if width == 0:
            formats = tuple((site, allowed_formats(unit, space)[0]) for site in sites)
            found.append(Choice(unit, 0, formats, 0, shape, price))
            continue
        share = width / (reference_width(unit, damage.background) or 1) if width is not None else 1.0
        for combination in product(allowed_formats(unit, space), repeat=len(sites)):
            pairs = tuple(zip(sites, combination, strict=True))
            own = [share * by_format[site, p.name] for site, p in pairs]
            paid = [prices.of_format(p) if unit.block is not None else 1.0 for p in combination]
            nbytes = _nbytes(problem, unit, width, dict(pairs), cut=cut)
            cost = price + sum(x * y for x, y in zip(own, paid, strict=True))
            found.append(Choice(unit, width, pairs, nbytes, shape + sum(own), cost))
    return found


def _nbytes(problem: Problem, unit: Unit, width: int | None, formats: Mapping[str, Precision], *, cut: bool) -> int:
    layout = problem.layout
    runs: dict[str, tuple[Run, ...]] = {
        name: (Run(count=layout.weight_shape(layout.weights[name], width)[1], precision=formats[site]),)
        for site, names in sites_of(layout, unit).items()
        for name in names
    }
    biases = (unit.out_weight,) if cut and problem.refits and unit.out_weight else ()
    widths = {unit.dim: width} if unit.dim is not None and width is not None else {}
    structure = Structure(widths=widths, weights=runs, biases=biases, adapters=problem.adapters(unit))
    return resolve_unit(layout, unit, structure).nbytes


def pareto(found: list[Choice]) -> list[Choice]:
    """The choices that no other choice beats in both bytes and cost."""
    front: list[Choice] = []
    for choice in sorted(found, key=lambda c: (c.nbytes, c.cost)):
        if not front or choice.cost < front[-1].cost:
            front.append(choice)
    return front


METHOD = SearchMethod(
    paper="this project; HiGHS through scipy.optimize.milp",
    config=Config,
    search=search,
    require_feasible=require_feasible,
    cost=cost,
    needs=("space", "measure"),
    measures_damage=True,
)
