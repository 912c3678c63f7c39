"""The content key of every stage: everything that its result depends on.

`version` is raised whenever a change to the code changes results.
"""

from typing import Any, ClassVar

from trimbit.jobs.stages import StageKey

Plain = dict[str, Any] | None  # a step of a recipe as plain data


class TextKey(StageKey):
    """Text sampled from the model."""

    stage: ClassVar[str] = "text"
    version: ClassVar[int] = 4
    weights: str
    config: str
    tokenizer: str  # with its chat template
    compute: str
    rows: int
    length: int
    seed: int
    threads: int  # the sums of matrix products depend on them


class MomentsKey(StageKey):
    """Second moments of the inputs of every site of the dense model."""

    stage: ClassVar[str] = "moments"
    version: ClassVar[int] = 4
    weights: str
    config: str
    tokens: str
    compute: str
    rotation: Plain


class RankingKey(StageKey):
    """The order in which channels and KV groups are cut."""

    stage: ClassVar[str] = "ranking"
    version: ClassVar[int] = 2
    moments: str  # key; a criterion on gradients reads the same model and tokens
    criterion: Plain


class ImportanceKey(StageKey):
    """The importance of each layer to the task."""

    stage: ClassVar[str] = "importance"
    version: ClassVar[int] = 1
    moments: str
    importance: Plain
    kept: dict[str, list[int]]


class CandidatesKey(StageKey):
    """Compressed weights of every choice, made from the dense model alone; a store."""

    stage: ClassVar[str] = "candidates"
    version: ClassVar[int] = 4
    source: str  # the key of the moments, or the weights' hash where none are needed
    quant: Plain
    repair: Plain
    lowrank: Plain
    seed: int | None  # None without low-rank pairs
    rotation: Plain
    order: str = "original"  # of the columns


class DamageKey(StageKey):
    """Damage of every choice; a store with a journal, since other search spaces share some of the changes."""

    stage: ClassVar[str] = "damage"
    version: ClassVar[int] = 3
    moments: str
    candidates: str
    background: dict[str, Any]
    kept: dict[str, list[int]]
    tokens: str


class PredictedKey(StageKey):
    """Damage of every choice, predicted."""

    stage: ClassVar[str] = "predicted"
    version: ClassVar[int] = 5
    moments: str
    candidates: str
    space: dict[str, Any]
    rankings: str
    tokens: str
    draws: int
    seed: int


class CorrectedKey(StageKey):
    """Damage of every choice, the predictions being corrected by some that are measured."""

    stage: ClassVar[str] = "corrected"
    version: ClassVar[int] = 2
    predicted: str  # key


class TeacherKey(StageKey):
    """The original's last hidden states by row of tokens; a store."""

    stage: ClassVar[str] = "teacher"
    version: ClassVar[int] = 2
    weights: str
    config: str
    compute: str
    device: str


class AppliedKey(StageKey):
    """A plan applied for real."""

    stage: ClassVar[str] = "applied"
    version: ClassVar[int] = 5
    plan: dict[str, Any]  # without its provenance and its cache of keys and values, which change no weight
    fit: str | None  # tokens that the method is fitted to
    choose: str | None
    report: str | None
    compute: str
    quant: Plain
    repair: Plain
    lowrank: Plain
    seed: int | None


class PairsKey(StageKey):
    """The trained low-rank pairs of an applied plan."""

    stage: ClassVar[str] = "pairs"
    version: ClassVar[int] = 1
    applied: str
    tune: dict[str, Any]
    rows: str
    seed: int


class OutcomesKey(StageKey):
    """Outcomes of whole plans; a store with a journal."""

    stage: ClassVar[str] = "outcomes"
    version: ClassVar[int] = 1
    moments: str
    candidates: str
    choose: str
    length: int
    objective: dict[str, Any]
    tasks: list[str]  # lm-eval's version and the tasks' files
    tune: Plain  # None if plans are measured without training
    rows: str | None  # digest of the training rows


class SharesKey(StageKey):
    """KL of the model under masks; a store with a journal."""

    stage: ClassVar[str] = "shares"
    version: ClassVar[int] = 3
    masked: dict[str, Any]
    moments: str
    train: str
    device: str


class PlanKey(StageKey):
    """The result of a search."""

    stage: ClassVar[str] = "plan"
    version: ClassVar[int] = 2
    weights: str
    config: str
    text: list[str]  # digests of all rows
    recipe: dict[str, Any]  # its fields that affect the plan
    search: dict[str, Any]
    rankings: str
    budget_nbytes: int
    seed: int
    device: str
