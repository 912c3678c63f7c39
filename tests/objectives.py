"""A small search by trials."""

import json

from qpruner_jobs import CHOOSING, PRUNED, SMALL
from sessions import open_session
from trimbit.pipeline.recipes import load_recipe
from trimbit.schema.objective import Outcome

QUICK = "search.optimiser={trials: 6, initial: 3, pool: 16, near: 8, steps: 5, batch: 2, smaller: 2}"


FOUR = "space.formats=[uint2g32, uint3g32, uint4g32, int8row]"


def session(job, cache, *overrides):
    recipe = load_recipe("qpruner-3", SMALL + PRUNED + CHOOSING + (QUICK, FOUR, "search.per=unit") + overrides)
    return open_session(job.model, recipe, calibration=str(job.text), cache=cache)


def trials(cache):
    (journal,) = (cache / "plans").glob("*.jsonl")
    entries = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    entries.sort(key=lambda entry: ("after" in entry, entry["number"]))
    return [Outcome.model_validate(entry["outcome"]) for entry in entries]
