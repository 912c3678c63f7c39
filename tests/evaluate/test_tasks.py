"""Means of tasks."""

import pytest

from trimbit.evaluate import tasks
from trimbit.schema.evaluation import Score, TaskScore


def test_mean():
    def mean(*found):
        scored = (Score(value=value, stderr=error) for value, error in found)
        fields = {"documents": 9, "version": "1", "headline": "acc", "acc_norm": None, "correct": "", "seconds": 1.0}
        return tasks.mean_score({str(at): TaskScore(acc=score, **fields) for at, score in enumerate(scored)})

    found = mean((0.5, 0.03), (0.7, 0.04))
    assert (found.value, found.stderr) == pytest.approx((0.6, 0.025))
    assert mean((0.5, 0.03), (0.7, None)).stderr is None
