"""Plans judged in processes of their own, each with a whole model and its share of the threads.

What they need beside the model is in the cache already, so that a process starts in seconds.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trimbit.errors import TrimbitError
from trimbit.measurements import Outcome
from trimbit.model.load import open_checkpoint
from trimbit.plan import Plan
from trimbit.recipe import Recipe

if TYPE_CHECKING:
    from trimbit.judging import Judging
    from trimbit.preparation import Preparation

_judging: "Judging | None" = None  # of a process that judges


class Workers:
    """Processes that judge plans; close them when there are no more."""

    def __init__(self, prepared: "Preparation", count: int) -> None:
        fields = (prepared.checkpoint.path, prepared.recipe.model_dump_json(), prepared.calibration, prepared.seed)
        threads = max(1, torch.get_num_threads() // count)
        self.pool = ProcessPoolExecutor(
            count, mp_context=get_context("spawn"), initializer=_start, initargs=(*fields, prepared.cache, threads)
        )

    def outcomes(self, plans: Sequence[Plan]) -> Iterator[Outcome]:
        """What was found of each, in their order, as soon as it is known.

        Raises:
            TrimbitError: if a process dies; memory is what it lacks as a rule.
        """
        try:
            yield from self.pool.map(_judge, plans)
        except BrokenProcessPool as err:
            raise TrimbitError("a process that judges plans has died; use fewer (search.objective.workers)") from err

    def close(self) -> None:
        """End the processes; what they have not begun is dropped."""
        self.pool.shutdown(cancel_futures=True)


def _start(model: Path, recipe: str, calibration: str, seed: int, cache: Path, threads: int) -> None:
    from trimbit.judging import Judging
    from trimbit.preparation import Preparation

    global _judging
    torch.set_num_threads(threads)
    checkpoint, read = open_checkpoint(model), Recipe.model_validate_json(recipe)
    _judging = Judging(Preparation(checkpoint=checkpoint, recipe=read, calibration=calibration, seed=seed, cache=cache))


def _judge(plan: Plan) -> Outcome:
    assert _judging is not None
    return _judging.outcome(plan)
