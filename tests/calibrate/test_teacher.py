"""The original's answers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from qpruner_jobs import session
from trimbit.calibrate import teacher
from trimbit.calibrate.teacher import teacher_outputs
from trimbit.pipeline.recovering import examples_of


def test_the_originals_answers_are_kept_and_are_those_of_the_whole_model(job, tmp_path, monkeypatch):
    """In groups of rows, what is missing alone; on all tokens of an instruction."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"instruction": "w5", "output": f"w{at + 8} " * (at + 1)}) for at in range(5)))
    opened = session(job, "qpruner-1", f"tune.data={data}", "tune.length=64", cache=tmp_path / "c")
    rows = examples_of(opened.job, None)
    assert all(bool(row.loss_mask[1:].all()) and not bool(row.loss_mask[0]) for row in rows)
    examples = [row.tokens for row in rows]
    monkeypatch.setattr(teacher, "CARRIED", 4 * 48 * 100)
    swept = []
    first = teacher_outputs(opened.stream, examples[:2], tmp_path / "kept", lambda *done: swept.append(done))
    count = len(swept)
    original = teacher_outputs(opened.stream, examples, tmp_path / "kept", lambda *done: swept.append(done))
    assert 0 < count < len(swept)
    again = teacher_outputs(opened.stream, examples, tmp_path / "kept", lambda *_: pytest.fail("all are there"))
    whole = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    for row in examples:
        found = original.hidden(row)
        assert torch.equal(found, again.hidden(row))
        want = whole.get_decoder()(row[None]).last_hidden_state[0]
        torch.testing.assert_close(found.float(), want, rtol=0.05, atol=0.05)
    assert torch.equal(first.hidden(examples[1]), original.hidden(examples[1]))
    torch.testing.assert_close(original.head(found).float(), whole.lm_head(want), rtol=0.05, atol=0.1)
