"""Trials by several processes, and their journal."""

import csv
import json
import re

import pytest
import torch
from sessions import compress, open_session

from objectives import QUICK, session, trials
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import ArtifactError, BudgetError, NumericsError
from trimbit.pipeline.recipes import read_recipe
from trimbit.schema.budget import Budget
from trimbit.schema.plan import load_plan


@pytest.fixture
def threads():
    """The number of threads is as it was, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("calibration", ["file", "self"])
def test_processes_find_the_same(job, tmp_path, monkeypatch, calibration):
    """Two processes, each with a model of its own, judge the plans of a batch; they sample no text of their own."""
    if calibration == "self":
        monkeypatch.setattr(job, "text", "self")
        torch.set_num_threads(2)  # a process has one, and must not take that for what the text was sampled with
    one = session(job, tmp_path / "one")
    two = session(job, tmp_path / "two", "search.objective.workers=2")
    assert one._search_key(10**6) == two._search_key(10**6)
    monkeypatch.setattr(two.judging, "outcome", None)  # nothing is judged in this process
    plans = [opened.find_plan(None) for opened in (one, two)]
    assert plans[0].weights == plans[1].weights
    for alone, shared in zip(trials(tmp_path / "one"), trials(tmp_path / "two"), strict=True):
        assert alone.kl == pytest.approx(shared.kl, rel=1e-4)
    assert two.judging.workers is None
    assert len(list((tmp_path / "two").glob("tokens/*"))) == (calibration == "self")
    assert len(list((tmp_path / "two").glob("candidates/*"))) == 1


def test_a_journal_whose_order_is_another_goes_on(job, tmp_path, monkeypatch):
    """Processes end in any order: here the first plan of a batch was still at work when the search was killed."""
    opened = session(job, tmp_path)
    plan = opened.find_plan(None)
    (journal,) = (tmp_path / "plans").glob("*.jsonl")
    header, *lines = journal.read_text().splitlines(keepends=True)
    assert [json.loads(line)["number"] for line in lines] == [0, 1, 2, 3, 4, 5, 0, 1]
    journal.write_text("".join([header, lines[2], lines[1]]))
    again = session(job, tmp_path)
    asked = []
    real = again.judging.outcome
    monkeypatch.setattr(again.judging, "outcome", lambda plan: asked.append(plan) or real(plan))
    assert again.find_plan(None) == plan
    assert len(asked) == 6
    trials = [[trial.outcome for trial in by.tried[plan.content][1]] for by in (opened, again)]
    assert trials[0] == trials[1]


def test_what_a_process_cannot_do_is_said(job, tmp_path, monkeypatch):
    opened = session(
        job, tmp_path, "search.objective.workers=2", "search.objective.steps=2", "tune.learning_rate=1.0e+30"
    )
    monkeypatch.setattr(opened.judging, "outcome", None)  # nothing is judged in this process
    with pytest.raises(NumericsError, match="a loss of step 2 of recovery is not finite"):
        opened.find_plan(None)
    assert opened.judging.workers is None


def test_trials_lie_beside_the_plan_that_came_of_them(job, tmp_path):
    """Of two budgets, each has its own; fewer trials are not told as more; a plan without trials has none."""
    opened = session(job, tmp_path / "c")
    limit = opened.limit(None)
    wide, narrow = opened.find_plan(None), opened.find_plan(Budget.parse(f"{limit - 600}B"))
    fewer = session(job, tmp_path / "c", QUICK.replace("trials: 6", "trials: 4"))
    few = fewer.find_plan(None)
    with pytest.raises(BudgetError) as refused:
        opened.limit(Budget.parse("1kB"))
    smallest = re.search(r"--budget (\d+B)", str(refused.value))[1]
    for name, (by, plan, count) in {
        "wide": (opened, wide, 6 + 2), "narrow": (opened, narrow, 6 + 2), "few": (fewer, few, 4 + 2),
        "smallest": (opened, opened.find_plan(Budget.parse(smallest)), 0),
    }.items():  # fmt: skip
        by.write(plan, tmp_path / name)
        table = tmp_path / name / "trials.csv"
        rows = list(csv.DictReader(table.read_text().splitlines())) if count else []
        assert table.exists() == bool(count)
        assert len(rows) == count
        if count:
            assert plan.found_by.nbytes in {int(row["nbytes"]) for row in rows}
            sizes = sorted(int(row["nbytes"]) for row in rows)
            assert sizes[0] + 1_000 < sizes[1] < sizes[2] - 1_000  # the smallest plan, and one half-way to the others
        if name == "narrow":
            assert all(int(row["nbytes"]) <= limit - 600 for row in rows)


def test_the_pareto_set_can_be_applied(job, tmp_path, monkeypatch):
    monkeypatch.setattr("trimbit.search.solvers.pareto.PAGE", 0)  # all plans of this model are less than that apart
    opened = session(job, tmp_path / "c")
    compress(opened, None, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "trials.csv").read_text().splitlines()))
    unbeaten = {f"trial-{row['trial']}.json": row for row in rows if row["pareto"] == "1"}
    found = {path.name: load_plan(path) for path in (tmp_path / "out" / "pareto").iterdir()}
    assert found.keys() == unbeaten.keys()
    assert len(found) > 1
    for name, row in unbeaten.items():
        assert found[name].found_by.nbytes == int(row["nbytes"])
        assert found[name].found_by.notes == (f"{float(row['kl']):.4f} nats",)
    smallest = min(found.values(), key=lambda plan: plan.found_by.nbytes)
    recipe = read_recipe(smallest.found_by.recipe, "its own")
    by = open_session(job.model, recipe, calibration=str(job.text), cache=tmp_path / "c", seed=smallest.found_by.seed)
    by.write(smallest, tmp_path / "small")
    assert weight_nbytes(tmp_path / "small") == smallest.found_by.nbytes < weight_nbytes(tmp_path / "out") - 1_000


def test_a_damaged_journal_is_named(job, tmp_path):
    session(job, tmp_path).find_plan(None)
    (journal,) = (tmp_path / "plans").glob("*.jsonl")
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:]]) + "\n")
    with pytest.raises(ArtifactError, match=f"{journal}: .* damaged; remove it"):
        session(job, tmp_path).find_plan(None)
