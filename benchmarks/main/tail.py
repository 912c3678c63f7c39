"""A baseline made by hand: one format for all blocks, and the next larger one for as many of the last as fit."""

from itertools import pairwise

from trimbit.errors import BudgetError
from trimbit.measure.choices import sites_of
from trimbit.pipeline.job import Job
from trimbit.pipeline.oracle import problem_of
from trimbit.schema.plan import Plan
from trimbit.schema.precision import parse_precision

MENU = tuple(parse_precision(f"uint{bits}g128") for bits in (2, 3, 4, 5, 6, 8))


def tail_high(job: Job, nbytes: int) -> Plan:
    """The largest such plan within a number of bytes; the embedding has the smaller format.

    Raises:
        BudgetError: if not even the smallest format fits.
    """
    problem, blocks = problem_of(job, nbytes), job.layout.blocks
    for low, high in reversed(tuple(pairwise(MENU))):
        for count in reversed(range(blocks)):
            formats = {
                site: high if unit.block is not None and unit.block >= blocks - count else low
                for unit in job.layout.units.values()
                for site in sites_of(job.layout, unit)
            }
            plan = problem.plan({}, formats, f"{low.name}, the last {count} blocks {high.name}")
            if plan.found_by.nbytes <= nbytes:
                return plan
    raise BudgetError(f"{nbytes} bytes are less than {MENU[0].name} takes")
