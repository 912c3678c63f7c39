"""Models whose directory has no tokenizer: refused before anything long; a compressed one still runs."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from commands import compress, copied
from trimbit.errors import ArtifactError
from trimbit.runtime.load import load_tokenizer

WORDS = ["no usable tokenizer", "add the original's tokenizer files"]
TEXT = ["--context", 32, "--windows", 1]


def without(folder):
    files = [*folder.glob("*token*"), *folder.glob("chat_template*")]
    assert files
    for file in files:
        file.unlink()
    return folder


@pytest.fixture
def original(job, tmp_path):
    return without(copied(job, tmp_path))


@pytest.fixture
def small(compressed, tmp_path):
    return without(shutil.copytree(compressed, tmp_path / "small"))


def stop(*_args, **_kwargs):
    raise AssertionError("something long began")


@pytest.mark.parametrize("text", ["self", "file", "none"])
def test_it_is_not_compressed(refused, job, original, tmp_path, monkeypatch, text):
    monkeypatch.setattr("trimbit.jobs.stages.Runner.run", stop)
    recipe = "uniform-rtn" if text == "none" else job.recipe
    options = ["--recipe", recipe, "--calibration", job.text if text == "file" else "self"]
    for more in ((), ("--dry-run",)):
        refused(*compress(original, tmp_path / "out", options), *more, words=[str(original), *WORDS])


def test_no_plan_is_applied_to_it(refused, job, compressed, original, tmp_path, monkeypatch):
    monkeypatch.setattr("trimbit.jobs.stages.Runner.run", stop)
    arguments = ["apply", original, compressed / "plan.json", tmp_path / "out", "--calibration", job.text]
    refused(*arguments, words=[str(original), *WORDS])


def test_neither_is_evaluated(refused, job, original, small, task_data, monkeypatch):
    for module in ("perplexity", "lm_eval"):
        monkeypatch.setattr(f"trimbit.evaluate.{module}.load_model", stop)
    for model in (original, small):
        refused("eval", model, "--text", job.text, *TEXT, words=[str(model), *WORDS])
        refused("eval", model, "--tasks", "piqa", "--task-data", task_data, words=[str(model), *WORDS])
    with pytest.raises(ArtifactError, match=WORDS[0]):
        load_tokenizer(small)


def test_a_compressed_one_runs_and_is_shown(run, small):
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    prompt = torch.tensor([[5, 6, 7]])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4)
    assert made.shape == (1, 7)
    code, out, err = run("show", small)
    assert code == 0, err
    assert out


def test_an_original_without_one_is_still_what_a_model_is_compared_with(run, job, compressed, original):
    code, out, err = run("eval", compressed, "--text", job.text, *TEXT, "--against", original)
    assert code == 0, err
    assert "KL to the original" in out
