"""QPruner's recipes with small numbers."""

from sessions import open_session
from trimbit.pipeline.recipes import load_recipe

SMALL = (
    "calibration.rows=6", "calibration.length=64", "calibration.held_out=2", "measure.rows=2", "measure.length=32",
    "lowrank.rank=2", "tune.steps=4", "tune.batch=12", "tune.micro=5", "tune.length=32", "tune.save_every=2",
    "tune.learning_rate=0.01", "tune.dropout=0",
)  # fmt: skip


PRUNED = ("criterion.samples=4", "criterion.length=32", "prune.first=0.3", "prune.last=0", "prune.channel_multiple=16")


CHOOSING = ("importance.classes=8", "space.formats=[nf4g64, int8row]")


TRIALS = (
    "search.optimiser={trials: 6, initial: 3, pool: 16, near: 8, steps: 5, smaller: 2}", "search.per=unit",
    "space.formats=[uint2g32, uint3g32, uint4g32, int8row]",
)  # fmt: skip


RECIPES = {
    "loftq-only": SMALL,
    "llm-pruner": SMALL + PRUNED,
    "qpruner-1": SMALL + PRUNED,
    "qpruner-2": SMALL + PRUNED + CHOOSING,
    "qpruner-3": SMALL + PRUNED + CHOOSING + TRIALS,
}


def session(job, name, *overrides, **fields):
    return open_session(job.model, load_recipe(name, RECIPES[name] + overrides), calibration=str(job.text), **fields)
