"""What `compress`, `plan` and `apply` refuse: one line on stderr, and nothing is left behind."""

import json

import pytest
import torch
from safetensors.torch import load_file

from commands import changed, compress, copied
from tiny import save_tiny, tiny_model


def test_a_missing_model(refused, options, tmp_path):
    refused(*compress(tmp_path / "nonesuch", tmp_path / "out", options), words=["nonesuch", "does not exist"])


def test_a_truncated_file(refused, job, options, tmp_path):
    file = copied(job, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(*compress(file.parent, tmp_path / "out", options), words=["model.safetensors", "truncated or corrupt"])


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_a_missing_tokenizer_is_said_before_anything_long(refused, job, tmp_path, more, monkeypatch):
    """Even by a recipe that reads no text: the compressed directory carries the tokenizer."""
    model = copied(job, tmp_path)
    for file in model.glob("tokenizer*"):
        file.unlink()
    monkeypatch.setattr("trimbit.pipeline.flow.prepare", lambda _: pytest.fail("too late"))
    words = ["no usable tokenizer", "add the original's tokenizer files"]
    refused(*compress(model, tmp_path / "out", ["--recipe", "uniform-rtn"]), *more, words=words)


def test_a_nan_names_its_tensor(refused, job, options, tmp_path):
    model, name = copied(job, tmp_path), "model.layers.1.mlp.up_proj.weight"
    changed(model, lambda state: state[name].view(-1)[5].fill_(torch.nan))
    refused(*compress(model, tmp_path / "out", options), words=[name, "1 NaN"])


def test_pickles_are_not_opened(refused, job, options, tmp_path):
    model = copied(job, tmp_path)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refused(*compress(model, tmp_path / "out", options), words=["pickled", "pytorch_model.bin", "safetensors"])


def test_a_compressed_directory_is_no_model(refused, compressed, options, tmp_path):
    refused(*compress(compressed, tmp_path / "out", options), words=["already compressed by trimbit"])


def test_an_unknown_key_in_a_plan(refused, job, options, compressed, tmp_path):
    fields = json.loads((compressed / "plan.json").read_text()) | {"rotations": {}}
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    refused(
        "apply",
        job.model,
        tmp_path / "plan.json",
        tmp_path / "out",
        *options,
        words=["plan.json: rotations: unknown key"],
    )
    refused("apply", job.model, tmp_path / "none.json", tmp_path / "out", *options, words=["none.json", "No such file"])


def test_a_dry_run_reads_the_text(refused, job, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for text in (tmp_path / "empty.txt", job.model / "config.json"):
        given = ["--recipe", job.recipe, "--calibration", text]
        refused(*compress(job.model, tmp_path / "out", given), "--dry-run", words=[text.name])


def test_an_unknown_key_in_a_recipe(refused, job, tmp_path):
    (tmp_path / "mine.yaml").write_text(job.recipe.read_text() + "\nserach: {}\n")
    mine = ["--recipe", tmp_path / "mine.yaml", "--calibration", job.text]
    refused(*compress(job.model, tmp_path / "out", mine), words=["mine: serach: unknown key"])


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("search.steps=3", "search knapsack: steps: unknown key"),
        ("quant.damping=-1", "quant gptq: damping: "),
        ("search.name=nonesuch", "no search method 'nonesuch'"),
        ("damping", "cannot read the override"),
        ("calibration.length=257", "calibration.length is 257 tokens, but the model has 256 positions"),
    ],
)
def test_a_bad_override(refused, job, options, tmp_path, override, word):
    refused(*compress(job.model, tmp_path / "out", options, "--set", override), words=[word])


def test_a_plan_for_another_model(refused, job, options, compressed, tmp_path):
    save_tiny(tiny_model("llama", seed=1).bfloat16(), tmp_path / "other")
    plan = compressed / "plan.json"
    refused(
        "apply", tmp_path / "other", plan, tmp_path / "out", *options, words=["belongs to original", "not to other"]
    )


def test_a_plan_that_does_not_fit(refused, job, options, compressed, tmp_path):
    fields = json.loads((compressed / "plan.json").read_text())
    fields["cuts"] = {"blocks.9.mlp.mid": [0]}
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    refused("apply", job.model, tmp_path / "plan.json", tmp_path / "out", *options, words=["no dim 'blocks.9.mlp.mid'"])


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("1kB", ["1,000 bytes", "smallest feasible budget is", "--budget "]),
        ("45QB", ["'45QB'", "bpw", "MB"]),
        ("many", ["'many'", "give a positive number"]),
        ("0MB", ["'0MB'"]),
        ("-3MB", ["'-3MB'"]),
    ],
)
def test_a_budget_that_cannot_be(refused, job, options, tmp_path, budget, words):
    refused(*compress(job.model, tmp_path / "out", options, budget=budget), words=words)


def test_a_cache_that_cannot_be(refused, job, options, compressed, tmp_path):
    words = ["kv_cache", "the group has 64 channels", "head_dim is only 8"]
    refused(*compress(job.model, tmp_path / "out", options, "--set", "kv_cache.group=64"), words=words)
    refused(*compress(job.model, tmp_path / "out", options, "--set", "kv_cache.bits=9"), words=["kv_cache.bits: "])
    fields = json.loads((compressed / "plan.json").read_text()) | {"kv_cache": {"group": 64}}
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    refused("apply", job.model, tmp_path / "plan.json", tmp_path / "out", *options, words=words)
