"""What a job did: stages with their time and memory, plans that were tried, and the result; `run.json`."""

from typing import Literal

from trimbit.schema.base import Schema
from trimbit.schema.kv_cache import KVPrecision, kv_cache_nbytes
from trimbit.schema.plan import ModelRef

RUN_FILE = "run.json"


class Hardware(Schema):
    """What a figure was measured on."""

    cpu: str
    instruction_sets: tuple[str, ...]  # those that matrix products may use, such as avx2, avx512f, avx512_bf16
    threads: int
    gpu: str | None = None


class StageRecord(Schema):
    """One stage as it ran in this job."""

    stage: str
    key: str  # content key of the result
    cached: bool  # taken from the cache
    seconds: float  # without those of the stages that ran inside it
    peak_rss_nbytes: int  # of the process while the stage ran


class TextRecord(Schema):
    """The calibration text and what its rows are for."""

    name: str  # `self`, or the file's name
    digest: str  # of all tokens
    length: int  # tokens in a row
    fit_rows: int
    damage_rows: int  # of `measure.length` tokens
    choose_rows: int
    train_rows: int
    report_rows: int


class TriedPlan(Schema):
    """A plan that a search tried; KL in nats a token."""

    name: str
    plan: str  # content key
    nbytes: int
    predicted_kl: float | None = None  # by the additive model
    estimated_kl: float | None = None  # assembled from candidates, on the rows that plans are chosen by
    applied_kl: float | None = None  # applied, on the same rows
    nll: float | None = None  # of the next token, nats
    accuracy: float | None = None
    accuracy_stderr: float | None = None


class TrainingRecord(Schema):
    """Training of masks or of low-rank pairs."""

    what: Literal["masks", "pairs"]
    steps: int
    first_loss: float
    last_loss: float
    trained_nbytes: int | None = None
    optimizer_nbytes: int | None = None


class UnitRow(Schema):
    """What a plan keeps of a unit, in which formats and bytes."""

    unit: str
    kept: int | None  # members of its dim; None: it has no dim
    size: int | None
    formats: dict[str, str]  # roles that share a format, such as "q k v" -> its runs
    nbytes: int


class CacheRecord(Schema):
    """The shape of the cache of keys and values, layer by layer."""

    precision: KVPrecision | None
    head_dim: int
    heads: tuple[int, ...]  # KV heads that are left
    windows: tuple[int | None, ...]  # sliding windows; None: a layer reads all tokens

    def nbytes(self, context: int) -> int:
        """Bytes at `context` tokens, batch 1."""
        return kv_cache_nbytes(self.heads, self.windows, self.head_dim, self.precision, context)

    def bf16_nbytes(self, context: int) -> int:
        """The same if nothing were quantised."""
        return kv_cache_nbytes(self.heads, self.windows, self.head_dim, None, context)


class Run(Schema):
    """A finished job."""

    schema_version: Literal[1] = 1
    versions: dict[str, str]  # of trimbit, python, torch, transformers
    hardware: Hardware
    model: ModelRef
    parameters: int  # of the original
    seed: int
    text: TextRecord | None
    budget: str | None  # as it was written
    budget_nbytes: int
    nbytes: int  # of the weight files
    plan: str  # content key
    method: str
    predicted_kl: float | None
    chosen_kl: float | None  # on the rows that plans were chosen by
    report_kl: float | None  # on rows that nothing was fitted to or chosen by
    gap: float | None = None  # how much better a plan may be by the solver's objective, as a share; None: not proven
    tried: tuple[TriedPlan, ...] = ()
    training: tuple[TrainingRecord, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    units: tuple[UnitRow, ...] = ()
    kv_cache: CacheRecord
