"""A job whose damage is predicted: its stages, what is kept for the next budget, and what is refused."""

import json

import pytest

from jobs import BUDGET
from sessions import session
from trimbit.errors import RecipeError
from trimbit.schema.budget import Budget

PREDICTED = "measure.by=predicted"


def stages(out):
    return {one["stage"]: one for one in json.loads((out / "run.json").read_text())["stages"]}


def test_a_forward_pass_is_run_for_whole_sub_blocks_alone(job, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path / "cache"))
    plan = session(job, PREDICTED).compress(Budget.parse(BUDGET), tmp_path / "one")
    found = stages(tmp_path / "one")
    assert {"predicted", "corrected"} <= found.keys()
    assert "damage" not in found
    assert plan.found_by.predicted_damage > 0
    session(job, PREDICTED).compress(Budget.parse("0.5x"), tmp_path / "two")
    again = stages(tmp_path / "two")
    assert again["predicted"]["cached"]
    assert again["corrected"]["cached"]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("measure.rounds=2", "does not depend on a background"),
        ("lowrank={name: lowrank, params: {rank: 4}}", "low-rank pairs"),
    ],
)
def test_what_cannot_be_predicted_is_refused(job, override, reason):
    with pytest.raises(RecipeError, match=reason):
        session(job, PREDICTED, override).budget_nbytes(Budget.parse(BUDGET))
