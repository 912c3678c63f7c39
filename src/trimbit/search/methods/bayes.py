"""Bits refined by Bayesian optimisation: start from the plan by importance, and try plans within the budget.

A trial judges a whole plan by the objective; the Gaussian process models the logarithm of its KL on held-out tokens,
their NLL, or the error rate of tasks. The baseline, `engine: random`, tries as many plans without a model.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from trimbit.errors import RecipeError
from trimbit.schema.base import Schema
from trimbit.schema.found import Found, Tried
from trimbit.schema.objective import Objective, Outcome
from trimbit.search.effort import Effort
from trimbit.search.methods import importance
from trimbit.search.problem import NO_CHOICE, Problem, SearchMethod
from trimbit.search.solvers.bayes import Config as Optimiser
from trimbit.search.solvers.bayes import optimise, random_search, smaller
from trimbit.search.solvers.box import Box, Point
from trimbit.search.solvers.gaussian_process import require_botorch
from trimbit.search.variables import Per, variables

SMALLEST = 1e-9  # nats: a KL of zero counts as this in the logarithm


class Config(Schema):
    """Which weights share a format, the default budget, and the optimiser's constants."""

    per: Per = "block"  # code (harrysyz99/Qmixtuner): one format a block
    share: float = Field(default=0.25, ge=0, le=1)  # ours, without a budget: blocks in the largest format
    objective: Objective = Objective()
    engine: Literal["bayes", "random"] = "bayes"
    optimiser: Optimiser = Optimiser()


def default_nbytes(problem: Problem, config: Config) -> int:
    """Bytes with `share` of the variables in the largest format."""
    return importance.default_nbytes(problem, importance.Config(per=config.per, share=config.share))


def require_feasible(problem: Problem, config: Config) -> None:
    """Refuse early a missing library or a budget below the smallest formats everywhere.

    Raises:
        RecipeError: if botorch is missing, accuracy is asked for without tasks, or workers outnumber a batch.
        BudgetError: naming the smallest feasible budget.
    """
    if config.engine == "bayes":
        require_botorch()
    workers, batch = config.objective.workers, config.optimiser.batch
    if config.objective.by == "accuracy" and not config.objective.tasks:
        raise RecipeError("an objective by accuracy needs tasks: search.objective.tasks=[hellaswag]")
    if workers > batch:
        raise RecipeError(f"{workers} workers share a batch of {batch}: search.optimiser.batch={workers} at least")
    importance.require_feasible(problem, importance.Config(per=config.per))


def search(problem: Problem, config: Config) -> Found:
    """The best plan tried, and all plans tried.

    Raises:
        BudgetError: if nothing fits; names the smallest feasible budget.
    """
    require_feasible(problem, config)
    found = variables(problem, config.per)
    widths = tuple(tuple(math.log2(p.bits) for p in found.formats) for _ in found.costs)
    box = Box(costs=found.costs, values=widths, room_nbytes=found.room_nbytes)
    if not box.fits(box.lowest):  # the bound on the header leaves no room
        plan = found.plan(box.lowest, "smallest")
        return Found(plan=plan.with_provenance(notes=(NO_CHOICE.format("the lowest bits everywhere"),)))
    allocated = importance.allocate(found, problem.costs.importance()) if problem.importance else None
    start = [tuple(allocated.picked)] if allocated is not None else []
    outcomes: dict[Point, Outcome] = {}

    def evaluate(points: Sequence[Point]) -> Iterator[tuple[Point, float]]:
        plans = [found.plan(point, "a plan") for point in points]
        for at, outcome in problem.costs.outcomes(plans, config.objective):
            outcomes[points[at]] = outcome
            yield points[at], _value(outcome, config.objective)

    run = optimise if config.engine == "bayes" else random_search
    with problem.reporter.stage("trials of whole plans") as progress:
        tried = run(box, start, evaluate, config.optimiser, problem.seed, progress)
    points = [point for point, _ in tried]
    if config.engine == "bayes" and config.optimiser.smaller:
        below = smaller(box, dict(tried), config.optimiser, problem.seed)
        with problem.reporter.stage("trials of smaller plans") as progress:
            for done, _ in enumerate(evaluate(below), start=1):
                progress(done, len(below))
        points += below
    best = min(points, key=lambda point: _value(outcomes[point], config.objective))
    method = "Bayesian optimisation" if config.engine == "bayes" else "random search"
    return Found(
        plan=found.plan(best, method),
        tried=tuple(
            Tried(plan=found.plan(point, f"trial {at} of a search"), outcome=outcomes[point])
            for at, point in enumerate(points, start=1)
        ),
    )


def cost(problem: Problem, config: Config) -> Effort:
    """Trials of whole plans, including those for the Pareto set."""
    more = config.optimiser.smaller if config.engine == "bayes" else 0
    return Effort(trials=config.optimiser.trials + more, importance=problem.importance)


def result_fields(config: Config) -> dict[str, Any]:
    """The fields of the configuration that decide the plan: all but the number of processes."""
    return config.model_dump(mode="json", exclude={"objective": {"workers"}})


def _value(outcome: Outcome, objective: Objective) -> float:
    """The value that the Gaussian process models; less is better."""
    if objective.by == "accuracy":
        assert outcome.accuracy is not None
        return 1 - outcome.accuracy
    return outcome.nll if objective.by == "nll" else math.log(max(outcome.kl, SMALLEST))


def _objective(config: Config) -> Objective:
    return config.objective


METHOD = SearchMethod(
    paper="QPruner, arXiv:2412.11629",
    config=Config,
    search=search,
    require_feasible=require_feasible,
    cost=cost,
    default_nbytes=default_nbytes,
    needs=("space", "measure"),
    draws=True,
    objective=_objective,
    result_fields=result_fields,
)
