"""The best single format that fits: every weight in it, the embedding included, nothing pruned. The baseline."""

from pydantic import Field

from trimbit.schema.base import Schema
from trimbit.schema.found import Found
from trimbit.schema.plan import Plan
from trimbit.schema.precision import Int, Precision
from trimbit.search.effort import Effort
from trimbit.search.problem import Problem, SearchMethod

MENU = tuple(Int(bits=bits, group=group, symmetric=False) for bits in range(2, 9) for group in (32, 64, 128, None))


class Config(Schema):
    """The formats to try."""

    formats: tuple[Precision, ...] = Field(default=MENU, min_length=1)
    tries: int = Field(default=2, ge=1)  # ours: how many of the largest formats that fit are evaluated


def require_feasible(problem: Problem, config: Config) -> None:
    """Refuse early a budget that no format fits.

    Raises:
        BudgetError: naming the smallest feasible budget.
    """
    problem.require_feasible(_by_size(problem, config)[0])


def search(problem: Problem, config: Config) -> Found:
    """The format of least damage among the largest that fit; the largest if the recipe measures nothing.

    Raises:
        BudgetError: if none fits; names the smallest feasible budget.
    """
    require_feasible(problem, config)
    best, tried = problem.best_estimated(_largest(problem, config))
    return Found(plan=best, tried=tried)


def cost(problem: Problem, config: Config) -> Effort:
    """Assembling and measuring the largest formats that fit, if there are several."""
    plans = _largest(problem, config)
    if problem.measure is None or len(plans) < 2:
        return Effort()
    formats = dict.fromkeys(run.precision for plan in plans for runs in plan.weights.values() for run in runs)
    return Effort(
        assembled=len(plans),
        formats=tuple(p for p in formats if p not in problem.space.formats),
        embedding_formats=tuple(p for p in formats if p not in problem.space.embedding_formats),
    )


def _largest(problem: Problem, config: Config) -> list[Plan]:
    """The plans of the largest formats that fit, largest first."""
    fitting = [plan for plan in _by_size(problem, config) if plan.found_by.nbytes <= problem.budget_nbytes]
    return fitting[-config.tries :][::-1]


def _by_size(problem: Problem, config: Config) -> list[Plan]:
    return sorted(
        (problem.uniform(precision, f"uniform {precision.name}") for precision in config.formats),
        key=lambda plan: plan.found_by.nbytes,
    )


METHOD = SearchMethod(paper="baseline", config=Config, search=search, require_feasible=require_feasible, cost=cost)
