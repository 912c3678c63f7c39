"""`eval`: its JSON, its tables, and its errors."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from commands import compress
from jobs import write_text
from tiny import save_tiny, tiny_model
from trimbit.errors import DataError


def test_eval_prints_json(run, job, compressed):
    arguments = ["--text", job.text, "--context", 32, "--windows", 3, "--against", job.model, "--dtype", "float32"]
    code, out, err = run("eval", compressed, *arguments, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert math.isfinite(found["ppl"])
    assert found["kl"] >= 0
    assert found["hardware"].keys() == {"cpu", "instruction_sets", "threads", "gpu"}
    assert (found["context"], found["windows"], found["tokens"]) == (32, 3, 93)
    assert found["weight_nbytes"] == (compressed / "model.safetensors").stat().st_size
    assert found.keys() == {
        "schema_version", "model", "against", "text", "context", "windows", "tokens", "ppl", "kl", "top1_agreement",
        "kv_cache", "kv_cache_nbytes", "kv_cache_bf16_nbytes",
        "weight_nbytes", "bits_per_weight", "peak_rss_nbytes", "prefill_tokens_per_second", "decode_tokens_per_second",
        "dtype", "hardware", "versions",
    }  # fmt: skip
    code, out, err = run("eval", compressed, *arguments)
    assert code == 0, err
    assert "ppl@32" in out
    code, out, err = run("eval", job.model, "--text", job.text, "--context", 32, "--json")
    assert code == 0, err
    assert json.loads(out)["kl"] is None


TASKS = {
    "schema_version", "model", "task_data", "task_limit", "tasks", "task_mean", "dtype", "hardware", "versions",
}  # fmt: skip


def test_eval_of_tasks(run, job, compressed, task_data):
    arguments = ["eval", compressed, "--tasks", "piqa,winogrande", "--task-data", task_data, "--dtype", "float32"]
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found.keys() == TASKS
    piqa, winogrande = found["tasks"]["piqa"], found["tasks"]["winogrande"]
    fields = {"documents", "version", "headline", "acc", "acc_norm", "correct", "seconds"}
    assert piqa.keys() == winogrande.keys() == fields
    assert piqa["acc_norm"].keys() == found["task_mean"].keys() == {"value", "stderr"}
    assert winogrande["acc_norm"] is None
    assert (piqa["documents"], found["task_limit"]) == (3, None)
    assert found["versions"].keys() == {"torch", "transformers", "lm_eval"}
    code, out, err = run(*arguments, "--limit", 2)
    assert code == 0, err
    for row in ("piqa, acc_norm of 2", "winogrande, acc of 2", "mean of the tasks", "± 0.0 %"):
        assert row in out
    code, out, err = run(*arguments, "--text", job.text, "--context", 32, "--windows", 1, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found.keys() > TASKS | {"ppl", "weight_nbytes"}
    assert found["versions"].keys() == {"torch", "transformers", "lm_eval"}


def test_kl_is_to_the_original(run, refused, caplog, job, compressed, tmp_path):
    save_tiny(tiny_model("llama", seed=1).bfloat16(), tmp_path / "other")
    config = AutoConfig.from_pretrained(job.model)
    config.vocab_size = 80
    save_tiny(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tmp_path / "narrower")
    text = ["--text", job.text, "--context", 32]
    assert run("eval", compressed, *text, "--against", job.model)[0] == 0
    assert "was not made from the files in" not in caplog.text
    assert run("eval", compressed, *text, "--against", tmp_path / "other")[0] == 0
    assert "was not made from the files in" in caplog.text
    refused("eval", job.model, *text, "--against", tmp_path / "narrower", words=["vocabularies of different sizes"])
    refused("eval", job.model, *text, "--against", compressed, words=["is compressed; give the original"])


@pytest.mark.parametrize("context", [1, 1024])
def test_a_context_that_cannot_be(refused, job, compressed, context):
    for model in (job.model, compressed):
        refused("eval", model, "--text", job.text, "--context", context, words=[f"the context is {context} tokens"])


def test_a_damaged_directory(refused, job, compressed, tmp_path):
    shutil.copytree(compressed, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("eval", tmp_path / "cut", "--text", job.text, "--context", 32, words=["cut", "a weight file is damaged"])
    refused("show", tmp_path / "cut", words=["cut", "the weight files have", "run.json says"])


def test_what_was_found_on_a_text_is_told_if_the_tasks_fail(run, job, task_data, monkeypatch):
    def fails(*_args, **_kwargs):
        raise DataError("no tasks today")

    monkeypatch.setattr("trimbit.evaluate.lm_eval.evaluate_tasks", fails)
    text = ["--text", job.text, "--context", 32, "--windows", 1]
    code, out, err = run("eval", job.model, *text, "--tasks", "piqa", "--task-data", task_data)
    assert code == 1
    assert "ppl@32" in out
    assert "no tasks today" in err


def test_text_shorter_than_a_window(refused, job, tmp_path):
    write_text(tmp_path / "short.txt", 20)
    short = ["--recipe", job.recipe, "--calibration", tmp_path / "short.txt"]
    refused(*compress(job.model, tmp_path / "out", short), words=["short.txt", "20 tokens, but one window needs 32"])
    write_text(tmp_path / "short.txt", 100)
    refused(
        *compress(job.model, tmp_path / "out", short),
        words=["short.txt", "20 rows of 32", "has only 3", "12 for calibration.rows"],
    )
    few = ["--text", tmp_path / "short.txt", "--context", 128]
    refused("eval", job.model, *few, words=["short.txt", "100 tokens, but one window needs 128"])


def test_no_such_text(refused, job, tmp_path):
    missing = ["--recipe", job.recipe, "--calibration", tmp_path / "nonesuch.txt"]
    refused(*compress(job.model, tmp_path / "out", missing), words=["nonesuch.txt"])
    refused("eval", job.model, "--text", tmp_path / "nonesuch.txt", words=["nonesuch.txt", "no such file"])


def test_eval_of_nothing_or_of_unknown_tasks(refused, job, task_data):
    refused("eval", job.model, words=["--text FILE", "--tasks NAMES"])
    refused("eval", job.model, "--tasks", "piqa,mmlu", words=["no task 'mmlu'", "known are boolq"])
    tasks = ["--tasks", "piqa,boolq", "--task-data", task_data]
    refused("eval", job.model, *tasks, words=[str(task_data), "boolq_superglue_validation.jsonl"])
    refused("eval", job.model, "--tasks", "piqa", "--limit", 0, words=["limit of documents is 0"])
    refused("eval", job.model, "--tasks", "piqa", "--against", job.model, words=["--against", "--text FILE"])
    refused("eval", job.model, "--text", job.text, "--limit", 5, words=["--limit", "--tasks NAMES"])
