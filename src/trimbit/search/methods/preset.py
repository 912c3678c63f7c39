"""Nothing to search: every block in one format, the embedding and the head in another. Baselines, and QPruner-1."""

from trimbit.measure.choices import sites_of, spared_format
from trimbit.schema.base import Schema
from trimbit.schema.found import Found
from trimbit.schema.plan import Plan
from trimbit.schema.precision import BF16, NormalFloat, Precision
from trimbit.search.problem import Problem, SearchMethod


class Config(Schema):
    """The formats."""

    blocks: Precision = NormalFloat(group=64)  # code (harrysyz99/Qmixtuner): bitsandbytes NF4
    embedding: Precision = BF16  # code (harrysyz99/Qmixtuner): the embedding and the head stay as they are


def default_nbytes(problem: Problem, config: Config) -> int:
    """The bytes of the only plan."""
    return _plan(problem, config).found_by.nbytes


def require_feasible(problem: Problem, config: Config) -> None:
    """Refuse a budget below the only plan.

    Raises:
        BudgetError: naming its bytes.
    """
    problem.require_feasible(_plan(problem, config))


def search(problem: Problem, config: Config) -> Found:
    """The only plan.

    Raises:
        BudgetError: if it does not fit; names its bytes.
    """
    plan = _plan(problem, config)
    problem.require_feasible(plan)
    return Found(plan=plan)


def _plan(problem: Problem, config: Config) -> Plan:
    formats: dict[str, Precision] = {}
    for unit in problem.layout.units.values():
        own = config.embedding if unit.block is None else config.blocks
        fixed = spared_format(unit, problem.space)
        formats |= dict.fromkeys(sites_of(problem.layout, unit), fixed or own)
    return problem.plan({}, formats, f"{config.blocks.name} in every block")


METHOD = SearchMethod(
    paper="QPruner, arXiv:2412.11629, as QPruner-1",
    config=Config,
    search=search,
    require_feasible=require_feasible,
    default_nbytes=default_nbytes,
)
