"""A job with all that it prepares, as one object for tests."""

from functools import cached_property

from jobs import BUDGET
from trimbit.pipeline import flow
from trimbit.pipeline.applying import applied
from trimbit.pipeline.oracle import ModelOracle, problem_of
from trimbit.pipeline.preflight import open_job, preflight
from trimbit.pipeline.prepare import prepare
from trimbit.pipeline.recipes import load_recipe
from trimbit.schema.budget import Budget

LIMIT = Budget.parse(BUDGET).nbytes(1)


class Session:
    """Offers the job's own attributes, too."""

    def __init__(self, job):
        self.job = job

    def __getattr__(self, name):
        return getattr(self.job, name)

    @cached_property
    def prepared(self):
        return prepare(self.job)

    @property
    def text(self):
        return self.prepared.text

    @cached_property
    def oracle(self):
        return ModelOracle(self.job, self.prepared)

    @property
    def candidates(self):
        return self.oracle.candidates

    def masked(self, config=None):
        return self.oracle.masked(config or self.job.steps.search)

    def problem(self, budget_nbytes=None, state=None):
        return problem_of(self.job, budget_nbytes or preflight(self.job, None), self.oracle, state)

    def budget_nbytes(self, budget=None):
        return preflight(self.job, budget)

    def found(self, budget=None):
        return flow.find_plan(self.job, budget)

    def find_plan(self, budget=None):
        return self.found(budget).plan

    def applied(self, plan):
        return applied(self.job, self.prepared, plan)

    def write(self, plan, out):
        return flow.apply(self.job, plan, out)

    def compress(self, budget, out):
        return flow.compress(self.job, budget, out)


def open_session(model, recipe, **fields):
    return Session(open_job(model, recipe, **fields))


def compress(session, budget, out):
    return session.compress(budget, out)


def session(job, *overrides, **fields):
    recipe = load_recipe(str(job.recipe), overrides)
    return open_session(job.model, recipe, **({"calibration": str(job.text)} | fields))


def entries(cache, stage):
    """Folders of a stage in a cache."""
    return sorted((cache / stage).glob("*"))
