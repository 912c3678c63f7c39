"""Counts of what a search will ask for, known before it runs; a dry run turns them into time and memory."""

from dataclasses import dataclass

from trimbit.schema.measurements import Background
from trimbit.schema.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Counts of what a search asks of the oracle; zero: nothing of this kind."""

    damage_rounds: int = 0  # rounds in which the damage of every choice is found
    background: Background | None = None  # of the first round
    solved: int = 0  # knapsacks over all choices
    assembled: int = 0  # plans assembled from candidates and measured
    cut: float = 0.0  # share of the sub-blocks, summed over assembled plans, that need a new cut candidate
    formats: tuple[Precision, ...] = ()  # of candidates for all weights of the blocks, besides the space's
    embedding_formats: tuple[Precision, ...] = ()  # likewise for the embedding and the head
    applied: int = 0  # plans applied for real to compare them
    trials: int = 0  # whole plans judged by the method's objective
    importance: bool = False  # whether the importance of each layer is asked for
    mask_steps: int = 0  # gradients of masks, a batch of rows each
    masked_rows: int = 0  # rows run under masks, without gradients
    rounded: int = 0  # elements rounded to nearest, to compare formats of channels


NOTHING = Effort()
