"""The KL that is reported, against one computed from the two directories by transformers alone."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import write_text
from sessions import open_session
from tiny import save_tiny, tiny_model
from trimbit.pipeline.recipes import load_recipe
from trimbit.schema.budget import Budget

LENGTH = 32
OVERRIDES = (
    f"calibration={{rows: 8, length: {LENGTH}, held_out: 2, report: 3}}",
    f"measure={{rows: 1, length: {LENGTH}}}",
    "search.tries=2",
    "search.formats=[uint2g32, uint3g32, uint4g32]",
    "compute=float32",
)
NEAR = {"rel": 0.005}  # where it is measured, both tables of embeddings are in bf16
CASES = (
    ("llama", torch.bfloat16),
    ("qwen2", torch.bfloat16),
    ("gemma3_text", torch.bfloat16),
    ("llama", torch.float16),
)


@torch.no_grad()
def kl(original, small, rows):
    """KL(original || small) in nats a token."""
    log_p, log_q = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(rows).logits.double().log_softmax(-1)
        for path in (original, small)
    )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(("model_type", "stored"), CASES)
def test_it_is_what_transformers_finds(model_type, stored, tmp_path):
    save_tiny(tiny_model(model_type).to(stored), tmp_path / "original")
    write_text(tmp_path / "text.txt", 20 * LENGTH)
    recipe = load_recipe("uniform-gptq", OVERRIDES)
    job = open_session(tmp_path / "original", recipe, calibration=str(tmp_path / "text.txt"), cache=tmp_path / "cache")
    small = tmp_path / "small"
    plan, run = job.compress(Budget.parse("0.35x"), small), json.loads((small / "run.json").read_text())
    words = AutoTokenizer.from_pretrained(small)((tmp_path / "text.txt").read_text())["input_ids"]
    windows = torch.tensor(words[: len(words) // LENGTH * LENGTH]).view(-1, LENGTH).tolist()
    used = [row for part in (job.text.fit, job.text.choose, job.text.report) for row in part.tokens.tolist()]
    assert len(used) == 13
    assert all(row in windows and used.count(row) == 1 for row in used)  # nothing is fitted to what is reported
    assert json.loads((small / "plan.json").read_text())["found_by"]["measured_damage"] == run["report_kl"]
    assert plan.found_by.measured_damage == run["report_kl"]
    found = kl(tmp_path / "original", small, job.text.report.tokens)
    assert 0.01 < found < 1
    assert run["report_kl"] == pytest.approx(found, **NEAR)
    assert run["chosen_kl"] == pytest.approx(kl(tmp_path / "original", small, job.text.choose.tokens), **NEAR)
