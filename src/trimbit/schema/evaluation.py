"""Measured results of a model: perplexity and speed on a text, accuracy on tasks."""

from typing import Literal

from trimbit.schema.base import Schema
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.run import Hardware


class Evaluation(Schema):
    """Perplexity, memory and speed of a model, with the text, settings and hardware they were measured on."""

    schema_version: Literal[2] = 2
    model: str
    against: str | None
    text: str
    context: int
    windows: int
    tokens: int  # scored
    ppl: float  # at this context
    kl: float | None  # KL(original || model), nats a token
    top1_agreement: float | None  # share of tokens where both put the same token first
    kv_cache: KVPrecision | None  # used for perplexity, KL, agreement and speed
    kv_cache_nbytes: int  # at this context, batch 1; exact values in bf16
    kv_cache_bf16_nbytes: int  # of the same model with nothing quantised
    weight_nbytes: int
    bits_per_weight: float | None  # 8 * weight_nbytes / parameters of the original
    peak_rss_nbytes: int  # of the process, before the original is loaded
    prefill_tokens_per_second: float  # with a packed cache, READ_WINDOWS windows are read together
    decode_tokens_per_second: float
    dtype: str
    hardware: Hardware
    versions: dict[str, str]


class Score(Schema):
    """A share of correct documents, and its standard error."""

    value: float
    stderr: float | None  # None for a single document


class TaskScore(Schema):
    """The result of lm-eval for one task."""

    documents: int
    version: str  # of lm-eval's task definition
    headline: Literal["acc", "acc_norm"]
    acc: Score
    acc_norm: Score | None
    correct: str  # "1" or "0" for each document, in order, by the headline; to compare models by document
    seconds: float

    @property
    def score(self) -> Score:
        """The headline score."""
        return self.acc_norm or self.acc


class TaskEvaluation(Schema):
    """Zero-shot scores of a model, with the data, settings and hardware they were measured on."""

    schema_version: Literal[2] = 2
    model: str
    task_data: str | None  # the folder; None: lm-eval's own data sets
    task_limit: int | None
    tasks: dict[str, TaskScore]
    task_mean: Score  # mean of the headline scores
    dtype: str
    hardware: Hardware
    versions: dict[str, str]
