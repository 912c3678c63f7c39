"""Text, statistics and measurements of a session, and its cache."""

import shutil

import pytest

from jobs import BUDGET
from sessions import LIMIT, compress, entries, open_session, session
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import DataError, RecipeError
from trimbit.pipeline import prepare as preparation
from trimbit.pipeline import text as texts
from trimbit.pipeline.recipes import load_recipe
from trimbit.schema.budget import Budget


def test_another_seed_draws_other_text(job):
    first, second = session(job).text.fit, session(job, seed=1).text.fit
    assert first.digest != second.digest
    assert first.digest == session(job).text.fit.digest


def test_no_row_has_two_uses(job):
    text = session(job, "calibration.training=3").text
    parts = (text.fit, text.train, text.choose, text.report)
    assert [len(part.tokens) for part in parts] == [12, 3, 2, 4]
    assert text.damage.tokens.shape == (2, 16)  # the beginnings of two more rows
    rows = [tuple(row) for part in parts for row in part.tokens.tolist()]
    assert len(set(rows)) == len(rows)
    beginnings = {tuple(row) for row in text.damage.tokens.tolist()}
    assert len(beginnings) == 2
    assert not beginnings & {row[at : at + 16] for row in rows for at in (0, 16)}


def test_self_calibration_is_repeatable(job, tmp_path):
    digests = []
    for name in ("first", "first", "second"):
        opened = session(job, calibration="self", cache=tmp_path / name)
        assert opened.text.fit.tokens.shape == (12, 32)
        digests.append(opened.text.fit.digest)
    assert len(set(digests)) == 1
    plan = compress(session(job, calibration="self", cache=tmp_path / "first"), Budget.parse(BUDGET), tmp_path / "out")
    assert plan.found_by.nbytes <= LIMIT
    assert "sampled from the model itself" in (tmp_path / "out" / "README.md").read_text()


MEASURED = "measure.by=measured"


def test_budgets_share_everything_but_the_search(job, tmp_path, monkeypatch):
    """A second budget measures nothing again."""
    opened = session(job, MEASURED, cache=tmp_path)
    opened.find_plan(Budget.parse("30kB"))
    monkeypatch.setattr(preparation, "collect", None)
    again = session(job, MEASURED, cache=tmp_path)
    (journal,) = tmp_path.glob("damage/*/journal.jsonl")
    before = journal.read_bytes()
    assert again.find_plan(Budget.parse("26kB")).found_by.nbytes <= 26_000
    assert journal.read_bytes() == before
    assert len(entries(tmp_path, "damage")) == 1


def test_a_torn_journal_in_the_cache(job, tmp_path):
    plan = session(job, MEASURED, cache=tmp_path).find_plan(Budget.parse(BUDGET))
    (journal,) = tmp_path.glob("damage/*/journal.jsonl")
    whole = journal.read_bytes()
    journal.write_bytes(whole[: len(whole) // 2])
    shutil.rmtree(tmp_path / "plan")
    assert session(job, MEASURED, cache=tmp_path).find_plan(Budget.parse(BUDGET)) == plan
    assert journal.read_bytes().count(b"change") >= whole.count(b"change")


def test_nothing_half_written_is_left_in_the_cache(job, tmp_path):
    compress(session(job, cache=tmp_path / "cache"), Budget.parse(BUDGET), tmp_path / "out")
    assert entries(tmp_path / "cache" / "partial", "*") == []
    assert list((tmp_path / "cache").rglob("*.tmp")) == list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("missing", ["measure", "space"])
def test_a_search_that_needs_measurements(job, missing):
    with pytest.raises(RecipeError, match=r"search knapsack needs a `(space|measure)` in the recipe"):
        session(job, f"{missing}=null")


def test_pieces_to_measure_on_must_fit_a_row(job):
    with pytest.raises(RecipeError, match=r"measure\.length is 33 tokens, but a row has 32: raise calibration"):
        session(job, "measure.length=33")


def test_a_text_that_is_too_short_says_what_asks_for_rows(job, tmp_path):
    opened = session(job, "calibration.rows=60", "calibration.training=5", cache=tmp_path)
    parts = r"60 for calibration.rows \+ 5 for calibration.training \+ 2 for calibration.held_out \+ 2 for measure.rows"
    with pytest.raises(DataError, match=rf"73 rows of 32 tokens were requested, .*{parts} \+ 4 for calibration.report"):
        opened.find_plan(Budget.parse(BUDGET))
    assert entries(tmp_path, "*") == []


def test_calibration_text_must_exist(job, tmp_path):
    with pytest.raises(DataError, match="no calibration text"):
        session(job, calibration=str(tmp_path / "nonesuch.txt"))


def test_a_recipe_that_fits_nothing_asks_for_no_text(job, tmp_path, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("text was asked for")

    monkeypatch.setattr(texts, "sample_self", asked)
    recipe = load_recipe("uniform-rtn", ("search.formats=[uint4g32]",))
    compress(open_session(job.model, recipe, cache=tmp_path / "cache"), Budget.parse("60kB"), tmp_path / "out")
    assert weight_nbytes(tmp_path / "out") <= 60_000
