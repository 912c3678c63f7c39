"""Text, statistics and measurements of a session, and its cache."""

import pytest
from sessions import compress, open_session

from jobs import BUDGET
from sessions import LIMIT, session
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import DataError, RecipeError
from trimbit.pipeline import prepare as preparation
from trimbit.pipeline.recipes import load_recipe
from trimbit.schema.budget import Budget


def test_another_seed_draws_other_text(job):
    first, second = session(job).tokens, session(job, seed=1).tokens
    assert first.digest != second.digest
    assert first.digest == session(job).tokens.digest


def test_held_out_tokens_are_other_tokens(job):
    opened = session(job)
    assert opened.held_out.tokens.shape == (2, 32)
    rows = {tuple(row) for row in opened.tokens.tokens.tolist()}
    assert len(rows) == 12
    assert not rows & {tuple(row) for row in opened.held_out.tokens.tolist()}


def test_self_calibration_is_repeatable(job, tmp_path):
    digests = []
    for name in ("first", "first", "second"):
        opened = session(job, calibration="self", cache=tmp_path / name)
        assert opened.tokens.tokens.shape == (12, 32)
        digests.append(opened.tokens.digest)
    assert len(set(digests)) == 1
    plan = compress(session(job, calibration="self", cache=tmp_path / "first"), Budget.parse(BUDGET), tmp_path / "out")
    assert plan.found_by.nbytes <= LIMIT
    assert "sampled from the model itself" in (tmp_path / "out" / "README.md").read_text()


def test_budgets_share_everything_but_the_search(job, tmp_path, monkeypatch):
    """A second budget measures nothing again."""
    opened = session(job, cache=tmp_path)
    opened.find_plan(Budget.parse("30kB"))
    monkeypatch.setattr(preparation, "collect", None)
    again = session(job, cache=tmp_path)
    journals = {file.name: file.read_bytes() for file in (tmp_path / "measurements").glob("*.jsonl")}
    assert len(journals) == 1
    assert again.find_plan(Budget.parse("26kB")).found_by.nbytes <= 26_000
    assert journals == {file.name: file.read_bytes() for file in (tmp_path / "measurements").glob("*.jsonl")}


def test_a_torn_journal_in_the_cache(job, tmp_path, compressed):
    _, plan = compressed
    session(job, cache=tmp_path).find_plan(Budget.parse(BUDGET))
    (journal,) = (tmp_path / "measurements").glob("*.jsonl")
    journal.write_bytes(journal.read_bytes()[: journal.stat().st_size // 2])
    assert session(job, cache=tmp_path).find_plan(Budget.parse(BUDGET)) == plan


def test_nothing_half_written_is_left_in_the_cache(job, tmp_path):
    compress(session(job, cache=tmp_path / "cache"), Budget.parse(BUDGET), tmp_path / "out")
    left = [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".tmp" or "partial" in path.name]
    assert left == []


@pytest.mark.parametrize("missing", ["measure", "space"])
def test_a_search_that_needs_measurements(job, missing):
    with pytest.raises(RecipeError, match=r"search knapsack needs a `(space|measure)` in the recipe"):
        session(job, f"{missing}=null")


def test_too_few_rows_to_measure_on(job):
    with pytest.raises(RecipeError, match=r"measure\.rows: 13 of 12 calibration rows asked"):
        session(job, "measure.rows=13")


def test_calibration_text_must_exist(job, tmp_path):
    with pytest.raises(DataError, match="no calibration text"):
        session(job, calibration=str(tmp_path / "nonesuch.txt"))


def test_a_recipe_that_fits_nothing_asks_for_no_text(job, tmp_path, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("text was asked for")

    monkeypatch.setattr(preparation.data, "sample_self", asked)
    recipe = load_recipe("uniform-rtn", ("search.formats=[uint4g32]",))
    compress(open_session(job.model, recipe, cache=tmp_path / "cache"), Budget.parse("60kB"), tmp_path / "out")
    assert weight_nbytes(tmp_path / "out") <= 60_000
