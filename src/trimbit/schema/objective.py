"""The objective of a search over whole plans, and the outcome of a trial."""

from typing import Literal

from pydantic import Field

from trimbit.schema.base import Schema


class Objective(Schema):
    """The objective of a search over whole plans. KL and NLL, on held-out tokens, are measured in any case."""

    by: Literal["kl", "nll", "accuracy"] = "kl"  # paper: accuracy; ours: KL, whose noise is far below its differences
    steps: int = Field(default=0, ge=0)  # training steps of recovery before a plan is judged
    tasks: tuple[str, ...] = ()  # zero-shot; their mean is the accuracy; code (harrysyz99/Qmixtuner): hellaswag
    data: str | None = None  # folder with the files of the tasks
    documents: int | None = Field(default=500, ge=1)  # number per task, from the start; None: all
    workers: int = Field(default=1, ge=1)  # processes for the plans of a batch, each with a whole model in memory


class Outcome(Schema):
    """The outcome of a trial of a whole plan."""

    kl: float  # KL(original || model), nats a token
    nll: float  # of the next token, nats
    accuracy: float | None = None
    stderr: float | None = None  # of the accuracy
    correct: str | None = None  # "1" or "0" for each document, task by task
