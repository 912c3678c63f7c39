"""Bits refined by Bayesian optimisation: start from the plan by importance, and try plans within the budget.

A trial judges a whole plan by the objective; the Gaussian process models the logarithm of its KL on held-out tokens,
their NLL, or the error rate of tasks. `engine: random` tries as many plans without a model, the baseline.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from trimbit.errors import RecipeError
from trimbit.jobs.journal import Journal
from trimbit.schema.base import Schema
from trimbit.schema.objective import Objective, Outcome
from trimbit.schema.plan import Plan
from trimbit.search.methods import importance
from trimbit.search.problem import Problem
from trimbit.search.solvers.bayes import Config as Optimiser
from trimbit.search.solvers.bayes import optimise, random_search, smaller
from trimbit.search.solvers.box import Box, Point
from trimbit.search.solvers.gaussian_process import require_botorch
from trimbit.search.solvers.pareto import front
from trimbit.search.variables import Per, Variables, variables

PAPER = "QPruner, arXiv:2412.11629"
NEEDS = ("space", "measure")
SMALLEST = 1e-9  # nats: what the logarithm of a KL of zero is taken of


class Config(Schema):
    """What shares a format, the default budget, and the optimiser's constants."""

    per: Per = "block"  # code (harrysyz99/Qmixtuner): one format a block
    share: float = Field(default=0.25, ge=0, le=1)  # ours, without a budget: blocks in the largest format
    objective: Objective = Objective()
    engine: Literal["bayes", "random"] = "bayes"
    optimiser: Optimiser = Optimiser()


def default_limit(problem: Problem, config: Config) -> int:
    """Bytes with `share` of the variables in the largest format."""
    return importance.default_limit(problem, importance.Config(per=config.per, share=config.share))


def require_feasible(problem: Problem, config: Config) -> None:
    """Refuse, before anything long, a missing library or a budget below the smallest formats everywhere.

    Raises:
        RecipeError: if botorch is missing, accuracy is asked for on no task, or there are more workers than work.
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


def search(problem: Problem, config: Config) -> Plan:
    """The best plan tried; its notes tell the start's and the Pareto set of bytes and KL.

    Raises:
        BudgetError: if nothing fits; names the smallest feasible budget.
        PlanError: if the journal belongs to another search.
    """
    assert problem.outcomes is not None
    require_feasible(problem, config)
    found = variables(problem, config.per)
    widths = tuple(tuple(math.log2(p.bits) for p in found.formats) for _ in found.costs)
    box = Box(costs=found.costs, values=widths, limit=found.limit)
    if not box.fits(box.lowest):  # so near the smallest budget that the bound on the header leaves no room
        return found.plan(box.lowest, "smallest")
    start = [tuple(importance.allocate(found, problem.importance()))] if problem.importance is not None else []
    journal, known = journal_of(problem), known_trials(problem)

    def judged(points: Sequence[Point]) -> Iterator[tuple[Point, Outcome]]:
        assert problem.outcomes is not None
        for at, outcome in problem.outcomes([found.plan(point, "a plan") for point in points]):
            yield points[at], outcome

    def evaluate(points: Sequence[Point]) -> Iterator[tuple[Point, float]]:
        for point, outcome in judged(points):
            known[point] = outcome
            yield point, _value(outcome, config.objective)

    run = optimise if config.engine == "bayes" else random_search
    before = {point: _value(outcome, config.objective) for point, outcome in known.items()}
    with problem.reporter.stage("trials of whole plans") as progress:
        tried = run(
            box, start, evaluate, before, config.optimiser, problem.seed, progress,
            lambda number, point, _: journal.append(_entry(number, point, known[point])),
        )  # fmt: skip
    every = [(point, known[point]) for point, _ in tried]
    if config.engine == "bayes" and config.optimiser.smaller:
        after = [len(tried), config.optimiser.smaller]
        points, below = smaller(box, dict(tried), config.optimiser, problem.seed), known_trials(problem, after)
        with problem.reporter.stage("trials of smaller plans") as progress:
            for point, outcome in judged([point for point in points if point not in below]):
                below[point] = outcome
                journal.append(_entry(points.index(point), point, outcome) | {"after": after})
                progress(len(below), len(points))
        every += [(point, below[point]) for point in points]
    method = "Bayesian optimisation" if config.engine == "bayes" else "random search"
    return _best(found, every, config.objective, method)


def trials(problem: Problem, config: Config) -> list[tuple[Plan, Outcome]]:
    """Every plan that a search has tried, and what was found of it, in their order."""
    found = variables(problem, config.per)
    tried = list(known_trials(problem).items())[: config.optimiser.trials]
    tried += known_trials(problem, [len(tried), config.optimiser.smaller]).items()
    return [
        (
            found.plan(point, f"trial {at} of a search").with_provenance(notes=(_told(outcome, config.objective),)),
            outcome,
        )
        for at, (point, outcome) in enumerate(tried, start=1)
    ]


def result_fields(config: Config) -> dict[str, Any]:
    """What of the configuration decides the order of trials and their results; how many there are does not."""
    left: dict[str, Any] = {"optimiser": {"trials", "smaller"}, "share": True, "objective": {"workers"}}
    return config.model_dump(mode="json", exclude=left)


def _value(outcome: Outcome, objective: Objective) -> float:
    """What the Gaussian process models, the less the better."""
    if objective.by == "accuracy":
        assert outcome.accuracy is not None
        return 1 - outcome.accuracy
    return outcome.nll if objective.by == "nll" else math.log(max(outcome.kl, SMALLEST))


def _best(found: Variables, tried: Sequence[tuple[Point, Outcome]], objective: Objective, method: str) -> Plan:
    values = [_value(outcome, objective) for _, outcome in tried]
    plans = [found.plan(point, method) for point, _ in tried]
    sizes = [plan.found_by.nbytes for plan in plans]
    best = min(range(len(tried)), key=values.__getitem__)
    first, last = (_told(tried[at][1], objective) for at in (0, best))
    notes = [f"{method}: {len(tried)} plans tried, the first {first}, the best {last}"]
    notes += [f"Pareto: {sizes[at]:,} bytes, {_told(tried[at][1], objective)}" for at in front(sizes, values)]
    return plans[best].with_provenance(notes=tuple(notes))


def _told(outcome: Outcome, objective: Objective) -> str:
    """What the objective goes by, and the KL if that is something else."""
    kl = f"{outcome.kl:.4f} nats"
    if objective.by == "accuracy":
        assert outcome.accuracy is not None
        return f"{100 * outcome.accuracy:.1f} % and {kl}"
    return f"NLL {outcome.nll:.4f} and {kl}" if objective.by == "nll" else kl


def _entry(number: int, point: Point, outcome: Outcome) -> dict[str, Any]:
    return {"number": number, "levels": point, "outcome": outcome.model_dump()}


def journal_of(problem: Problem) -> Journal:
    """Where the trials of a search are kept."""
    return Journal(problem.journal, problem.key)


def known_trials(problem: Problem, after: list[int] | None = None) -> dict[Point, Outcome]:
    """Trials so far, in their order; or those of so many smaller plans that a search of so many trials ended with.

    Raises:
        PlanError: if they are another search's.
    """
    entries = journal_of(problem).read()
    own = sorted((entry for entry in entries if entry.get("after") == after), key=lambda entry: entry["number"])
    return {tuple(entry["levels"]): Outcome.model_validate(entry["outcome"]) for entry in own}
