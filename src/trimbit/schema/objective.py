"""What a search by trials of whole plans goes by, and what a trial found."""

from typing import Literal

from pydantic import Field

from trimbit.schema.base import Schema


class Objective(Schema):
    """What a search by trials of whole plans goes by. KL and NLL are on held-out tokens and measured in any case."""

    by: Literal["kl", "nll", "accuracy"] = "kl"  # paper: accuracy; ours: KL, whose noise is far below its differences
    steps: int = Field(default=0, ge=0)  # of recovery, before a plan is judged
    tasks: tuple[str, ...] = ()  # zero-shot ones whose mean is the accuracy; code (harrysyz99/Qmixtuner): hellaswag
    data: str | None = None  # the folder of their files
    documents: int | None = Field(default=500, ge=1)  # of each task, the first
    workers: int = Field(default=1, ge=1)  # processes that judge the plans of a batch, a whole model in each


class Outcome(Schema):
    """What a trial of a whole plan found."""

    kl: float  # KL(original || model), nats a token
    nll: float  # of the token that follows, nats
    accuracy: float | None = None
    stderr: float | None = None  # of the accuracy
    correct: str | None = None  # of each document, one task after the other: "1" or "0"
