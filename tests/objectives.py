"""A small search by trials."""

from qpruner_jobs import CHOOSING, PRUNED, SMALL
from sessions import open_session
from trimbit.pipeline.recipes import load_recipe

QUICK = "search.optimiser={trials: 6, initial: 3, pool: 16, near: 8, steps: 5, batch: 2, smaller: 2}"


FOUR = "space.formats=[uint2g32, uint3g32, uint4g32, int8row]"


def session(job, cache, *overrides):
    recipe = load_recipe("qpruner-3", SMALL + PRUNED + CHOOSING + (QUICK, FOUR, "search.per=unit") + overrides)
    return open_session(job.model, recipe, calibration=str(job.text), cache=cache)


def outcomes(found):
    """Of every plan that was tried."""
    return [one.outcome for one in found.tried if one.outcome is not None]
