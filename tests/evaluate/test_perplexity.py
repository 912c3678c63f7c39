"""Perplexity and KL of written models, against full logits."""

import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs import BUDGET
from sessions import compress, session
from trimbit.evaluate.perplexity import evaluate, final_hidden, read_hidden, score
from trimbit.schema.budget import Budget


def test_evaluation_against_the_original(job, compressed):
    out, plan = compressed
    found = evaluate(
        out, job.text, context=32, max_windows=4, against=job.model, dtype=torch.float32, progress=lambda *_: None
    )
    assert math.isfinite(found.ppl)
    assert found.kl > 0
    assert 0 <= found.top1_agreement <= 1
    assert found.weight_nbytes == plan.found_by.nbytes
    parameters = session(job).layout.parameters
    assert found.bits_per_weight == pytest.approx(8 * plan.found_by.nbytes / parameters)
    same = evaluate(
        job.model, job.text, context=32, max_windows=4, against=job.model, dtype=torch.float32, progress=lambda *_: None
    )
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1_agreement == 1
    assert same.windows == 4
    assert same.tokens == 4 * 31


def test_perplexity_and_kl_equal_full_logits(job, compressed):
    out, _ = compressed
    found = evaluate(
        out, job.text, context=50, max_windows=3, against=job.model, dtype=torch.float32, progress=lambda *_: None
    )
    ids = torch.tensor([int(word[1:]) for word in job.text.read_text().split()])[:150].view(3, 50)
    with torch.no_grad():
        small, large = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits[:, :-1].double().log_softmax(-1)
            for path in (out, job.model)
        )
    nll = -small.gather(-1, ids[:, 1:, None]).mean()
    assert found.ppl == pytest.approx(float(nll.exp()), rel=1e-4)
    assert found.kl == pytest.approx(float((large.exp() * (large - small)).sum(-1).mean()), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((large.argmax(-1) == small.argmax(-1)).double().mean()))


@pytest.mark.parametrize("together", [1, 2, 3])
def test_windows_that_are_read_together(job, tmp_path, monkeypatch, together):
    """Through a packed cache: the same as one after the other; the first is read by itself."""
    out, told, read = tmp_path / "small", [], []
    packed = {"bits": 2, "sink_tokens": 1, "recent_tokens": 8}
    compress(session(job, f"kv_cache={json.dumps(packed)}"), Budget.parse(BUDGET), out)

    def reading(model, windows):
        read.append(len(windows))
        return read_hidden(model, windows)

    monkeypatch.setattr("trimbit.evaluate.perplexity.READ_WINDOWS", together)
    monkeypatch.setattr("trimbit.evaluate.perplexity.read_hidden", reading)
    found = evaluate(
        out,
        job.text,
        context=48,
        max_windows=4,
        against=job.model,
        dtype=torch.float32,
        progress=lambda *at: told.append(at),
    )
    assert read == {1: [1, 1, 1, 1], 2: [1, 2, 1], 3: [1, 3]}[together]
    assert told == [(done, 4) for done in itertools.accumulate(read)]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    ids = torch.tensor([int(word[1:]) for word in job.text.read_text().split()])[: 4 * 48].view(4, 48)
    sums = sum(
        score(model, read_hidden(model, row[None])[0], row, (original, final_hidden(original, row))) for row in ids
    )
    assert [math.log(found.ppl), found.kl] == pytest.approx((sums[:2] / (4 * 47)).tolist(), rel=1e-4)
