"""What was measured of a model: perplexity and speed on a text, accuracy on tasks."""

from typing import Literal

from trimbit.schema.base import Schema
from trimbit.schema.kv_cache import KVPrecision


class Evaluation(Schema):
    """What was measured, on what, and with what."""

    schema_version: Literal[1] = 1
    model: str
    against: str | None
    text: str
    context: int
    windows: int
    tokens: int  # scored
    ppl: float  # at this context
    kl: float | None  # KL(original || model), nats a token
    top1_agreement: float | None  # share of tokens where both put the same token first
    kv_cache: KVPrecision | None  # that perplexity, KL, agreement and speed were measured with
    kv_cache_nbytes: int  # at this context, batch 1, exact values in bf16
    kv_cache_bf16_nbytes: int  # of the same model, if nothing were quantised
    weight_nbytes: int
    bits_per_weight: float | None  # 8 * weight_nbytes / parameters of the original
    peak_rss_nbytes: int  # of the process, without the original
    prefill_tokens_per_second: float  # of windows as they were read: through a packed cache READ_WINDOWS together
    decode_tokens_per_second: float
    dtype: str
    hardware: str
    threads: int
    versions: dict[str, str]


class Score(Schema):
    """A share of documents, and its standard error."""

    value: float
    stderr: float | None  # None for a single document


class TaskScore(Schema):
    """What lm-eval found for one task."""

    documents: int
    version: str  # of lm-eval's definition
    headline: Literal["acc", "acc_norm"]
    acc: Score
    acc_norm: Score | None
    correct: str  # of each document, in order, by the headline: "1" or "0"; to compare models by document
    seconds: float

    @property
    def score(self) -> Score:
        """The one to report."""
        return self.acc_norm or self.acc


class TaskEvaluation(Schema):
    """Zero-shot scores of a model, on what, and with what."""

    schema_version: Literal[1] = 1
    model: str
    task_data: str | None  # the folder; None: lm-eval's own data sets
    task_limit: int | None
    tasks: dict[str, TaskScore]
    task_mean: Score  # of the headlines
    dtype: str
    hardware: str
    threads: int
    versions: dict[str, str]
