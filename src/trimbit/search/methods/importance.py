"""Bits by importance: the wide formats go to the layers that tell most about the prediction, within the budget.

A layer's gain from more bits is max(I, 0) * log2(bits), with I its importance to the task (QPruner: the mutual
information of its output and the prediction). The variables of a layer share its gain by their bytes, so that a finer
division gains nothing. The knapsack solver maximises the sum of gains within the bytes; for two formats and layers of
equal size it picks the layers of largest I, as QPruner-2 does.
"""

import math
from collections import Counter
from collections.abc import Mapping

from pydantic import Field

from trimbit.errors import RecipeError
from trimbit.schema.base import Schema
from trimbit.schema.found import Found
from trimbit.search.effort import Effort
from trimbit.search.problem import NO_CHOICE, Problem, SearchMethod
from trimbit.search.solvers.knapsack import Config as Solver
from trimbit.search.solvers.knapsack import Solution, knapsack
from trimbit.search.variables import Per, Variables, variables


class Config(Schema):
    """Which weights share a format, and the default budget."""

    per: Per = "block"  # code (harrysyz99/Qmixtuner): one format a block
    share: float = Field(default=0.25, ge=0, le=1)  # ours, without a budget: blocks in the largest format


def default_nbytes(problem: Problem, config: Config) -> int:
    """Bytes with `share` of the variables in the largest format."""
    return variables(problem, config.per).share(config.share)


def require_feasible(problem: Problem, config: Config) -> None:
    """Refuse early choices that this search does not make, and a budget below the smallest formats.

    Raises:
        RecipeError: if the space has other widths, cuts of KV groups, or several formats of embedding and head.
        BudgetError: naming the smallest feasible budget.
    """
    space = problem.space
    if space.widths != (1.0,) or space.prune_kv_groups or len(space.embedding_formats) != 1:
        raise RecipeError(
            "this search chooses bits of the blocks alone: give one format in space.embedding_formats, and leave "
            "space.widths and space.prune_kv_groups out; `prune` says what is pruned"
        )
    found = variables(problem, config.per)
    problem.require_feasible(found.plan([0] * len(found.costs), "smallest"))


def search(problem: Problem, config: Config) -> Found:
    """The plan of largest total gain.

    Raises:
        BudgetError: if nothing fits; names the smallest feasible budget.
    """
    require_feasible(problem, config)
    found = variables(problem, config.per)
    solved = allocate(found, problem.costs.importance())
    if solved is None:  # the bound on the header leaves no room
        plan = found.plan([0] * len(found.costs), "bits by importance")
        return Found(plan=plan.with_provenance(notes=(NO_CHOICE.format("the lowest bits everywhere"),)))
    return Found(plan=found.plan(solved.picked, "bits by importance"), gap=solved.gap)


def cost(problem: Problem, config: Config) -> Effort:
    """The importance of each layer."""
    return Effort(importance=True)


def allocate(found: Variables, importance: Mapping[str, float]) -> Solution | None:
    """A level for each variable; None if not even the lowest levels fit."""
    layer_nbytes: Counter[str] = Counter()
    for layer, costs in zip(found.layers, found.costs, strict=True):
        layer_nbytes[layer] += costs[0]
    worth = [
        max(importance[layer], 0.0) * costs[0] / layer_nbytes[layer]
        for layer, costs in zip(found.layers, found.costs, strict=True)
    ]
    gains = [[own * math.log2(p.bits / found.formats[0].bits) for p in found.formats] for own in worth]
    items = [
        [(nbytes, -gain) for nbytes, gain in zip(costs, gain, strict=True)]
        for costs, gain in zip(found.costs, gains, strict=True)
    ]
    return knapsack(items, found.room_nbytes, Solver())


METHOD = SearchMethod(
    paper="QPruner, arXiv:2412.11629",
    config=Config,
    search=search,
    require_feasible=require_feasible,
    cost=cost,
    default_nbytes=default_nbytes,
    needs=("space", "importance"),
)
