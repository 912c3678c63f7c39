"""The dry run: what a job will take, from sizes alone and one timed matrix product."""

import time

import torch

from trimbit.model.forward.compute import fast_bf16, native
from trimbit.pipeline.job import Job
from trimbit.pipeline.preflight import preflight
from trimbit.schema.budget import Budget
from trimbit.search.methods import shares
from trimbit.search.two_formats.config import MaskedSearch, MaskTraining
from trimbit.trial.masked.memory import masked_nbytes

TASK_DOCUMENTS = 2000  # where no limit says how many
TASK_TOKENS = 200  # of a document's prompts and choices


def estimate(job: Job, budget: Budget | None) -> list[tuple[str, str]]:
    """Rows of (what, how much) for one job; checks that the budget is feasible.

    Time counts matrix products at the speed of one that is timed here; it is an order of magnitude, not a promise.
    """
    layout, recipe = job.layout, job.recipe
    limit = preflight(job, budget)
    rows = recipe.calibration.rows + recipe.calibration.held_out
    tokens, text = rows * recipe.calibration.length, rows + recipe.calibration.training
    block = sum(w.rows * w.cols for w in layout.weights.values() if w.unit.startswith("blocks.0."))
    hidden = tokens * layout.sizes["hidden"] * 4
    table = layout.sizes["vocab"] * layout.sizes["hidden"]
    streaming = 2 * 4 * block + 2 * hidden + 2 * table + 4 * table
    measuring = 0
    if (
        recipe.measure
    ):  # the model in bf16, the dense log-probabilities in fp16, hidden states before each block, a head
        judged = recipe.measure.rows * recipe.measure.length
        states = judged * layout.blocks * layout.sizes["hidden"] * 4
        measuring = 2 * layout.parameters + 2 * judged * layout.sizes["vocab"] + states + 2 * table
    recovering = 0
    if job.steps.tune is not None:  # the model, the original's head, and what a few rows leave for the backward pass
        blocks = 1 if job.steps.tune.checkpointing else layout.blocks
        width = 16 * layout.sizes["hidden"] + 8 * layout.sizes["mid"]
        recovering = limit + 2 * table + job.steps.tune.micro * job.steps.tune.length * blocks * width * 2
    masking = 0
    if isinstance(job.steps.search, MaskedSearch):
        masking = masked_nbytes(layout, job.steps.search, native(job.compute, job.device.type).itemsize)
    return [
        (
            "model",
            f"{job.checkpoint.model_id}, {layout.parameters:,} parameters, "
            f"{2 * layout.parameters / 1e6:.0f} MB in bf16",
        ),
        ("weight files", f"at most {limit:,} bytes ({8 * limit / layout.parameters:.2f} bits a parameter)"),
        ("calibration", f"{text} rows of {recipe.calibration.length} tokens, {job.calibration}"),
        ("memory", f"about {max(streaming, measuring, recovering, masking) / 1e6:.0f} MB above the libraries"),
        ("time", f"about {_seconds(job, tokens, block) / 60:.0f} minutes"),
    ]


def _seconds(job: Job, tokens: int, block: int) -> float:
    layout, recipe = job.layout, job.recipe
    speed = _products_per_second()
    measured = job.steps.method.measures_damage and recipe.measure is not None and recipe.space is not None
    trials = 3 if measured and recipe.measure and recipe.measure.apply_finalists else 1
    passes = 1 + 5 * trials  # statistics, and the passes of each application
    work = float(passes * tokens * layout.blocks * block)
    if measured and recipe.measure and recipe.space:
        want = recipe.measure
        choices = layout.blocks * (4 * len(recipe.space.formats) + 2 * len(recipe.space.widths))
        work += choices * want.rows * want.length * (layout.parameters / 2)
    step = 0.0
    if job.steps.tune is not None:  # the original forward, the compressed one forward and back, and their heads
        step = 4.0 * job.steps.tune.batch * job.steps.tune.length * layout.parameters
        work += job.steps.tune.steps * step
    if job.objective is not None and recipe.measure:
        goal = job.objective
        judged = recipe.calibration.held_out * recipe.measure.length * layout.parameters
        asked = len(goal.tasks) * (goal.documents or TASK_DOCUMENTS) * TASK_TOKENS * layout.parameters
        applied = tokens * layout.blocks * block if goal.steps else 0
        search = job.steps.search
        tried = search.optimiser.trials + (search.optimiser.smaller if search.engine == "bayes" else 0)
        work += tried * (judged + asked + applied + goal.steps * step)
    config = job.steps.search
    if isinstance(
        config, MaskTraining
    ):  # forward, twice if checkpointed, and back, for two error_model twice, and the head
        runs = 3.0 + config.checkpointing + (config.error_model != "expected") + (config.loss == "kl")
        work += runs * config.steps * config.batch * config.length * layout.parameters
    elif isinstance(config, shares.Config):
        tried = 4 * layout.blocks * len(config.factors)
        work += tried * config.rows * config.length * layout.parameters
    if job.calibration == "self":
        tokens += recipe.calibration.training * recipe.calibration.length
        work += 10.0 * tokens * layout.parameters  # decoding reads all weights for few rows
    rounding = sum(w.cols for w in layout.weights.values()) * 2e-4  # seconds, one column after the other
    return work / speed + rounding * (trials + (len(recipe.space.formats) if recipe.space else 0))


def _products_per_second() -> float:
    """Multiplications a second of a bf16 matrix product."""
    a, b = torch.zeros(1024, 1024, dtype=torch.bfloat16), torch.zeros(1024, 1024, dtype=torch.bfloat16)
    with fast_bf16():
        a @ b
        started = time.perf_counter()
        for _ in range(5):
            a @ b
        return 5 * 1024**3 / (time.perf_counter() - started)
