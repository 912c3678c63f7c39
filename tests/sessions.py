"""Sessions of the tiny job."""

from jobs import BUDGET
from trimbit.pipeline.recipes import load_recipe
from trimbit.pipeline.session import open_session
from trimbit.schema.budget import Budget

LIMIT = Budget.parse(BUDGET).nbytes(1)


def session(job, *overrides, **fields):
    recipe = load_recipe(str(job.recipe), overrides)
    return open_session(job.model, recipe, **({"calibration": str(job.text)} | fields))
