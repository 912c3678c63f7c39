"""Bits by group of input channels, weight by weight: the most salient groups get one bit more, as many others one less.

The salience of a group is the sum of w^2 / [H^-1]_jj^2 over its elements. The number of groups that change is that of
least error in the layer's output. Ours: E |(W - Q) x|^2, where the paper compares the outputs' distributions by KL.
"""

from typing import Literal

from pydantic import Field

from trimbit.errors import RecipeError
from trimbit.measure.choices import sites_of
from trimbit.model.resolved import resolve
from trimbit.schema.base import Schema
from trimbit.schema.found import Found
from trimbit.schema.plan import Plan
from trimbit.schema.precision import BF16, Binary, Int, Precision, Run
from trimbit.search.effort import Effort
from trimbit.search.problem import Problem, SearchMethod

GROUP: Literal[128] = 128  # code (Aaronhuang-778/SliM-LLM): channels


class Config(Schema):
    """The mean number of bits."""

    bits: int = Field(default=2, ge=2, le=7)
    embedding: Precision = BF16  # of the embedding and the head


def _formats(bits: int) -> tuple[Precision, Precision, Precision]:
    """The formats of one bit less, of `bits` bits, and of one bit more."""
    less = Int(bits=bits - 1, group=GROUP, symmetric=True) if bits > 2 else Binary(group=GROUP, mean=False)
    return less, Int(bits=bits, group=GROUP, symmetric=True), Int(bits=bits + 1, group=GROUP, symmetric=True)


def default_nbytes(problem: Problem, config: Config) -> int:
    """Bytes with the mean number of bits everywhere: changing groups in pairs does not change them."""
    return _uniform(problem, config).found_by.nbytes


def require_feasible(problem: Problem, config: Config) -> None:
    """Refuse a budget below the mean number of bits, and a model with too few groups.

    Raises:
        BudgetError: naming the smallest feasible budget.
        RecipeError: if something is pruned before the search, or a weight has fewer than two groups.
    """
    if problem.space.kept:
        raise RecipeError("bits by groups of channels need the whole model: leave `prune` out of the recipe")
    for name, weight in problem.layout.weights.items():
        if problem.layout.readers(weight.site) and weight.cols < 2 * GROUP:
            raise RecipeError(f"weight {name} has {weight.cols} input channels, fewer than two groups of {GROUP}")
    problem.require_feasible(_uniform(problem, config))


def cost(problem: Problem, config: Config) -> Effort:
    """Every weight is rounded once for each number of groups that may get a bit more."""
    blocks = [weight for weight in problem.layout.weights.values() if problem.layout.readers(weight.site)]
    return Effort(rounded=sum((w.cols // GROUP // 2 + 1) * w.rows * w.cols for w in blocks))


def search(problem: Problem, config: Config) -> Found:
    """The plan with the least output error of every weight.

    Raises:
        BudgetError: if the mean number of bits does not fit.
    """
    require_feasible(problem, config)
    base, layout = _uniform(problem, config), problem.layout
    names = [name for name, weight in layout.weights.items() if layout.readers(weight.site)]
    weights, moved, groups = dict(base.weights), 0, 0
    with problem.reporter.stage("bits of groups") as progress:
        for at, name in enumerate(names):
            weights[name], own = _best(problem, name, config.bits)
            moved += own
            groups += layout.weights[name].cols // GROUP
            progress(at + 1, len(names))
    plan = base.model_copy(update={"weights": weights})
    method = f"SliM at {config.bits} bits: {moved} of {groups} groups have a bit more, and as many one less"
    return Found(plan=plan.with_provenance(nbytes=resolve(plan, layout).file_nbytes, method=method))


def _uniform(problem: Problem, config: Config) -> Plan:
    formats = {
        site: config.embedding if unit.block is None else _formats(config.bits)[1]
        for unit in problem.layout.units.values()
        for site in sites_of(problem.layout, unit)
    }
    return problem.plan({}, formats, f"{config.bits} bits")


def _best(problem: Problem, name: str, bits: int) -> tuple[tuple[Run, ...], int]:
    """The runs of a weight, and how many of its groups have a bit more."""
    channels = problem.costs.channels()
    salience = channels.salience(name)
    whole = len(salience) // GROUP
    sums = [sum(salience[at * GROUP : (at + 1) * GROUP]) for at in range(whole)]
    ranked = sorted(range(whole), key=sums.__getitem__)
    less, base, more = _formats(bits)
    found: list[tuple[float, int, tuple[Run, ...]]] = []
    for moved in range(whole // 2 + 1):
        own = [base] * -(-len(salience) // GROUP)
        for low, high in zip(ranked[:moved], ranked[whole - moved :], strict=True):
            own[low], own[high] = less, more
        runs = _joined(own, len(salience))
        found.append((channels.rounding_error(name, runs), moved, runs))
    _, moved, runs = min(found, key=lambda one: one[:2])
    return runs, moved


def _joined(formats: list[Precision], channels: int) -> tuple[Run, ...]:
    """The runs of the groups' formats; neighbours of one format share a run, and the last group may be short."""
    runs: list[Run] = []
    for at, precision in enumerate(formats):
        count = min(GROUP, channels - at * GROUP)
        if runs and runs[-1].precision == precision:
            count += runs.pop().count
        runs.append(Run(count=count, precision=precision))
    return tuple(runs)


METHOD = SearchMethod(
    paper="SliM-LLM, arXiv:2405.14917",
    config=Config,
    search=search,
    require_feasible=require_feasible,
    cost=cost,
    default_nbytes=default_nbytes,
    reads_moments=True,
)
