"""The record of a job, `run.json`: its stages with time and memory, the plans tried, and the result."""

from typing import Literal

from trimbit.schema.base import Schema
from trimbit.schema.kv_cache import KVPrecision, kv_cache_nbytes
from trimbit.schema.measurements import Correction
from trimbit.schema.plan import ModelRef

RUN_FILE = "run.json"


class Hardware(Schema):
    """The hardware that a figure was measured on."""

    cpu: str
    instruction_sets: tuple[str, ...]  # that matrix products may use, such as avx2, avx512f, avx512_bf16
    threads: int
    gpu: str | None = None


class StageRecord(Schema):
    """One stage as it ran in this job."""

    stage: str
    key: str  # content key of the result
    cached: bool  # taken from the cache
    seconds: float  # excluding stages that ran inside it
    peak_rss_nbytes: int  # peak memory of the process while the stage ran


class TextRecord(Schema):
    """The calibration text, and the number of rows for each use."""

    name: str  # `self` or the file's name
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
    estimated_kl: float | None = None  # assembled from candidates, on the rows used to choose plans
    applied_kl: float | None = None  # applied for real, on the same rows
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
    """A unit in a plan: kept members, formats and bytes."""

    unit: str
    kept: int | None  # members of its dim; None: it has no dim
    size: int | None
    formats: dict[str, str]  # roles that share runs, such as "q k v" -> these runs
    nbytes: int


class CacheRecord(Schema):
    """The shape of the KV cache, layer by layer."""

    precision: KVPrecision | None
    head_dim: int
    heads: tuple[int, ...]  # kept KV heads
    windows: tuple[int | None, ...]  # sliding windows; None: full attention

    def nbytes(self, context: int) -> int:
        """Bytes at `context` tokens, batch 1."""
        return kv_cache_nbytes(self.heads, self.windows, self.head_dim, self.precision, context)

    def bf16_nbytes(self, context: int) -> int:
        """The same with nothing quantised."""
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
    budget: str | None  # as the user wrote it
    budget_nbytes: int
    nbytes: int  # of the weight files
    plan: str  # content key
    method: str
    predicted_kl: float | None
    chosen_kl: float | None  # on the rows used to choose plans
    report_kl: float | None  # on the report rows: nothing was fitted to them or chosen by them
    gap: float | None = None  # relative gap to the optimum of the solver's objective, as proven by the solver
    corrections: tuple[Correction, ...] = ()  # of predicted damage, by kind of choice
    tried: tuple[TriedPlan, ...] = ()
    training: tuple[TrainingRecord, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    units: tuple[UnitRow, ...] = ()
    kv_cache: CacheRecord
