"""Recovery: what it trains on, and how it goes on after a kill."""

from dataclasses import replace

import pytest
import torch

from qpruner_jobs import session
from sessions import compress
from trimbit.pipeline import teacher
from trimbit.pipeline.recovering import examples_of, pairs_stage
from trimbit.recover.tune import drawn


@pytest.mark.slow
def test_recovery_that_was_broken_off_goes_on(job, tmp_path, monkeypatch):
    """With dropout, in the middle of an epoch."""
    noisy = ("tune.dropout=0.3", "tune.batch=5")
    compress(session(job, "qpruner-1", *noisy, cache=tmp_path / "one"), None, tmp_path / "whole")
    from trimbit.recover import tune

    real, steps = tune._step, []

    def breaking(*arguments):
        if len(steps) == 3:
            steps.append("killed")
            raise KeyboardInterrupt
        steps.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(tune, "_step", breaking)
    with pytest.raises(KeyboardInterrupt):
        compress(session(job, "qpruner-1", *noisy, cache=tmp_path / "two"), None, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    compress(session(job, "qpruner-1", *noisy, cache=tmp_path / "two"), None, tmp_path / "resumed")
    assert steps == [0, 1, 2, "killed", 2, 3]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert files[0] == files[1]


def test_recovery_trains_on_rows_of_its_own(job, tmp_path):
    one, other = (session(job, "qpruner-1", f"calibration.training={n}", cache=tmp_path) for n in (0, 3))
    rows = [torch.cat([row.tokens for row in examples_of(opened.job, opened.text)]) for opened in (one, other)]
    assert torch.equal(rows[0], one.text.fit.tokens.flatten())
    assert torch.equal(rows[1], other.text.train.tokens.flatten())
    assert len(rows[1]) == 3 * len(rows[0]) // 6


def test_training_asks_the_original_for_what_was_drawn_and_no_more(job, tmp_path, monkeypatch):
    opened = session(job, "qpruner-1", "tune.batch=3", "tune.steps=2", cache=tmp_path)
    plan, config, examples = opened.find_plan(None), opened.steps.tune, examples_of(opened.job, opened.text)
    applied, asked, found = opened.applied(plan), set(), teacher.teacher_outputs

    def listening(*arguments):
        original = found(*arguments)
        listen = lambda tokens: asked.add(tuple(tokens.tolist())) or original.hidden(tokens)  # noqa: E731
        return replace(original, hidden=listen)

    monkeypatch.setattr(teacher, "teacher_outputs", listening)
    opened.runner.run(pairs_stage(opened.job, opened.prepared, plan, applied, config))
    rows = drawn(config, len(examples), 0)
    assert asked == {tuple(examples[at].tokens.tolist()) for at in rows}
    assert len(asked) == 6 < len(examples)
