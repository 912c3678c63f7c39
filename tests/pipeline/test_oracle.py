"""Trials by several processes, and their journal."""

import csv
import multiprocessing
import re
import shutil

import pytest
import torch

from objectives import QUICK, session
from sessions import compress, entries, open_session
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import BudgetError, NumericsError
from trimbit.pipeline.oracle import ModelOracle
from trimbit.pipeline.recipes import read_recipe
from trimbit.schema.budget import Budget
from trimbit.schema.plan import load_plan
from trimbit.schema.run import Run


@pytest.fixture
def threads():
    """The number of threads is as it was, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("calibration", ["file", "self"])
def test_processes_find_the_same(job, tmp_path, monkeypatch, calibration):
    """Two processes, each with a model of its own, measure the plans of a batch; they sample no text of their own."""
    if calibration == "self":
        monkeypatch.setattr(job, "text", "self")
        torch.set_num_threads(2)  # a process has one, and must not take that for what the text was sampled with
    one = session(job, tmp_path / "one")
    first = one.found()
    two = session(job, tmp_path / "two", "search.objective.workers=2")
    monkeypatch.setattr(ModelOracle, "outcome", None)  # nothing is measured in this process
    second = two.found()
    assert first.plan.weights == second.plan.weights
    for alone, shared in zip(first.tried, second.tried, strict=True):
        assert alone.outcome.kl == pytest.approx(shared.outcome.kl, rel=1e-4)
    assert len(entries(tmp_path / "two", "text")) == (calibration == "self")
    assert len(entries(tmp_path / "two", "candidates")) == 1


def test_a_search_goes_on_whatever_was_measured_before(job, tmp_path, monkeypatch):
    """Processes end in any order: here the first plan of a batch was still at work when the search was killed."""
    found = session(job, tmp_path).found()
    (journal,) = tmp_path.glob("outcomes/*/journal.jsonl")
    lines = [line for line in journal.read_bytes().split(b"\n") if line]
    assert len(lines) == 6 + 2
    journal.write_bytes(lines[2] + b"\n" + lines[1] + b"\n")
    shutil.rmtree(tmp_path / "plan")
    asked, real = [], ModelOracle.outcome
    monkeypatch.setattr(ModelOracle, "outcome", lambda *given: asked.append(given) or real(*given))
    assert session(job, tmp_path).found() == found
    assert len(asked) == 6


@pytest.mark.slow
def test_what_a_process_cannot_do_is_said(job, tmp_path, monkeypatch):
    opened = session(
        job, tmp_path, "search.objective.workers=2", "search.objective.steps=2", "tune.learning_rate=1.0e+30"
    )
    monkeypatch.setattr(ModelOracle, "outcome", None)  # nothing is measured in this process
    with pytest.raises(NumericsError, match="a loss of step 2 of recovery is not finite"):
        opened.find_plan(None)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_trials_lie_beside_the_plan_that_came_of_them(job, tmp_path):
    """Of two budgets, each has its own; fewer trials are not shown as more; a plan without trials has none."""
    opened = session(job, tmp_path / "c")
    budget_nbytes = opened.budget_nbytes()
    fewer = session(job, tmp_path / "c", QUICK.replace("trials: 6", "trials: 4"))
    with pytest.raises(BudgetError) as refused:
        opened.budget_nbytes(Budget.parse("1kB"))
    smallest = re.search(r"--budget (\d+B)", str(refused.value))[1]
    narrow = f"{budget_nbytes - 600}B"
    for name, (by, budget, count) in {
        "wide": (opened, None, 6 + 2), "narrow": (opened, narrow, 6 + 2), "few": (fewer, None, 4 + 2),
        "smallest": (opened, smallest, 0),
    }.items():  # fmt: skip
        plan = by.compress(Budget.parse(budget) if budget else None, tmp_path / name)
        table = tmp_path / name / "trials.csv"
        rows = list(csv.DictReader(table.read_text().splitlines())) if count else []
        assert table.exists() == bool(count)
        assert len(rows) == count
        run = Run.model_validate_json((tmp_path / name / "run.json").read_text())
        assert len(run.tried) == count
        assert run.budget == budget
        if count:
            assert plan.found_by.nbytes in {int(row["nbytes"]) for row in rows}
            sizes = sorted(int(row["nbytes"]) for row in rows)
            assert sizes[0] + 1_000 < sizes[1] < sizes[2] - 1_000  # the smallest plan, and one half-way to the others
        if name == "narrow":
            assert all(int(row["nbytes"]) <= budget_nbytes - 600 for row in rows)


@pytest.mark.slow
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
    smallest = min(found.values(), key=lambda plan: plan.found_by.nbytes)
    recipe = read_recipe(smallest.found_by.recipe, "its own")
    by = open_session(job.model, recipe, calibration=str(job.text), cache=tmp_path / "c", seed=smallest.found_by.seed)
    by.write(smallest, tmp_path / "small")
    assert weight_nbytes(tmp_path / "small") == smallest.found_by.nbytes < weight_nbytes(tmp_path / "out") - 1_000


def test_a_damaged_journal_loses_one_outcome(job, tmp_path, monkeypatch, caplog):
    found = session(job, tmp_path).found()
    (journal,) = tmp_path.glob("outcomes/*/journal.jsonl")
    lines = [line for line in journal.read_bytes().split(b"\n") if line]
    journal.write_bytes(b"\n".join([*lines[:2], lines[2][:20], *lines[3:]]) + b"\n")
    shutil.rmtree(tmp_path / "plan")
    asked, real = [], ModelOracle.outcome
    monkeypatch.setattr(ModelOracle, "outcome", lambda *given: asked.append(given) or real(*given))
    assert session(job, tmp_path).found() == found
    assert len(asked) == 1
    assert f"{journal}, line 3 is damaged" in caplog.text
