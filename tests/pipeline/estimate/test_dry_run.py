"""Dry runs: the stages of an estimate are those of the job's run.json, and what is in the cache counts as nothing."""

import pytest

import masked_jobs
import qpruner_jobs
import sessions
from jobs import BUDGET
from sessions import LIMIT, entries, open_session
from trimbit.pipeline.estimate.dry_run import estimate
from trimbit.report.estimate_table import duration, estimate_lines, estimate_table
from trimbit.schema.base import parse_json
from trimbit.schema.budget import Budget
from trimbit.schema.recipe import Recipe
from trimbit.schema.run import RUN_FILE, Run

TRAINED = ("search.objective={steps: 2}", "search.optimiser={trials: 2, initial: 2, pool: 8, near: 4, smaller: 1}")
SHARES = {"low": "int3g32", "high": "int8g32", "tile": 16, "length": 16, "share": 0.25, "rows": 2, "factors": [2.0]}


def other(job, name, params, **fields):
    made = masked_jobs.recipe(steps=2).model_dump(mode="json") | {"search": {"name": name, "params": params}}
    return open_session(job.model, Recipe.model_validate(made | fields, strict=False), calibration=str(job.text))


JOBS = {
    "knapsack, two rounds, text of its own": (
        lambda job: sessions.session(job, "measure.by=measured", "measure.rounds=2", calibration="self"),
        BUDGET,
    ),
    "knapsack, estimates alone": (lambda job: sessions.session(job, "measure.apply_finalists=false"), BUDGET),
    "knapsack, predicted": (
        lambda job: sessions.session(job, "measure.by=predicted", "measure.apply_finalists=false"),
        BUDGET,
    ),
    "uniform": (lambda job: sessions.session(job, "search={name: uniform}"), BUDGET),
    "qpruner-1": (lambda job: qpruner_jobs.session(job, "qpruner-1"), None),
    "qpruner-3": (lambda job: qpruner_jobs.session(job, "qpruner-3"), None),
    "qpruner-3, trained": (lambda job: qpruner_jobs.session(job, "qpruner-3", *TRAINED), None),
    "toga": (lambda job: masked_jobs.session(job, steps=2), None),
    "shares": (lambda job: other(job, "shares", SHARES), None),
    "rounding, no text": (lambda job: other(job, "preset", {}), None),
}


SLOW = {"knapsack, two rounds, text of its own", "shares", "toga", "qpruner-1", "qpruner-3", "qpruner-3, trained"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in JOBS]
)
def test_its_stages_are_those_of_the_run(job, tmp_path, monkeypatch, name):
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path / "cache"))
    make, limit = JOBS[name]
    budget = Budget.parse(limit) if limit else None
    told = estimate(make(job).job, budget)
    assert not any(one.cached for one in told.stages)
    assert all(one.seconds > 0 or one.stage == "plan" for one in told.stages)  # a preset is not searched for
    assert all(one.peak_rss_nbytes > told.opened_nbytes for one in told.stages)
    assert told.seconds == sum(one.seconds for one in told.stages)
    assert told.peak_rss_nbytes == max(one.peak_rss_nbytes for one in told.stages)
    assert not (tmp_path / "cache").exists()

    make(job).compress(budget, tmp_path / "out")
    run = parse_json(Run, tmp_path / "out" / RUN_FILE, ValueError)
    assert {one.stage for one in told.stages} == {one.stage for one in run.stages}

    again = estimate(make(job).job, budget)
    make(job).compress(budget, tmp_path / "again")
    run = parse_json(Run, tmp_path / "again" / RUN_FILE, ValueError)
    assert {one.stage for one in again.stages} == {one.stage for one in run.stages}
    assert again.seconds == 0
    assert all(one.cached for one in again.stages)


MEASURED = "measure.by=measured"


@pytest.mark.slow
def test_what_an_interrupted_measurement_left_counts_less(job, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path))
    made = sessions.session(job, MEASURED)
    made.find_plan(Budget.parse(BUDGET))
    (folder,) = entries(tmp_path, "damage")
    other_budget = Budget.parse(f"{LIMIT + 500}B")
    stages = {one.stage: one for one in estimate(sessions.session(job, MEASURED).job, other_budget).stages}
    assert stages["damage"].seconds == 0
    assert not stages["damage"].cached  # its journal is read again
    assert stages["moments"].cached
    assert stages["plan"].seconds > 0
    journal = folder / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))
    half = {one.stage: one for one in estimate(sessions.session(job, MEASURED).job, other_budget).stages}
    assert half["damage"].seconds > 0


def test_a_search_that_tries_more_takes_longer(job, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path))

    def runs(*overrides):
        told = estimate(sessions.session(job, *overrides).job, Budget.parse(BUDGET))
        return {one.stage: one.runs for one in told.stages}

    assert runs()["applied"] == 1
    assert runs("measure.by=measured", "measure.rounds=2")["damage"] == 2
    assert runs("measure.apply_finalists=false")["applied"] == 1


def test_what_is_printed(job, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path))
    told = estimate(qpruner_jobs.session(job, "qpruner-1").job, None)
    lines, table = estimate_lines(told), estimate_table(told)
    assert any(f"{told.budget_nbytes:,} bytes" in line for line in lines)
    assert duration(told.seconds) in lines[-1]
    assert [row[0] for row in table.rows] == [*(one.stage for one in told.stages), "all"]
    assert {len(row) for row in table.rows} == {len(table.columns)}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (99, "99 s"), (150, "2.5 min"), (720, "12 min"), (7200, "2.0 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
