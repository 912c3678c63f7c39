"""The stage that runs the original over rows that something is compared on: plans applied for real, masks, pairs."""

from collections.abc import Iterable

from torch import Tensor

from trimbit.calibrate.teacher import Teacher, teacher_outputs
from trimbit.pipeline.job import Job
from trimbit.pipeline.keys import TeacherKey


def teacher(job: Job, rows: Iterable[Tensor]) -> Teacher:
    """The original's outputs for rows of tokens; each row is computed once."""
    key = TeacherKey(
        weights=job.model.weights_hash, config=job.model.config_hash, compute=job.recipe.compute,
        device=job.device.type,
    )  # fmt: skip
    with job.runner.store(key, "the original's outputs") as work:
        return teacher_outputs(job.original, rows, work.folder, work.progress)
