"""What a search will ask for, as counts that are known before it runs: a dry run turns them into time and memory."""

from dataclasses import dataclass

from trimbit.schema.measurements import Background
from trimbit.schema.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Counts of what a search asks of the oracle; zero: it asks for nothing of the kind."""

    damage_rounds: int = 0  # of the damage of every choice
    background: Background | None = None  # of the first of these rounds
    solved: int = 0  # knapsacks over all choices
    assembled: int = 0  # plans put together from candidates, and measured
    cut: float = 0.0  # of the sub-blocks of all assembled plans, those whose cut candidate is not there yet
    formats: tuple[Precision, ...] = ()  # that all weights of the blocks get candidates in, beside the space's
    embedding_formats: tuple[Precision, ...] = ()  # likewise the embedding and the head
    applied: int = 0  # plans applied for real to compare them
    trials: int = 0  # whole plans judged by the method's objective
    importance: bool = False  # of each layer
    mask_steps: int = 0  # gradients of masks, a batch of rows each
    masked_rows: int = 0  # rows run under masks, without gradients
    rounded: int = 0  # elements rounded to nearest to compare formats of channels


NOTHING = Effort()
