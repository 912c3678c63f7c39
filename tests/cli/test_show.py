"""`show` of a directory: by `run.json` and `plan.json` alone, checked against each other and the weights."""

import json

import pytest
from safetensors.torch import load_file

from results import NBYTES, make_plan, write_result
from trimbit.schema.plan import load_plan


def test_of_a_real_job(run, compressed):
    code, out, err = run("show", compressed, "--json")
    assert code == 0, err
    found, plan = json.loads(out), load_plan(compressed / "plan.json")
    assert found["nbytes"] == plan.found_by.nbytes == (compressed / "model.safetensors").stat().st_size
    assert [row["unit"] for row in found["units"]] == [
        "embed", *(f"blocks.{i}.{kind}" for i in range(3) for kind in ("attn", "mlp")), "head",
    ]  # fmt: skip
    stored = sum(t.numel() * t.element_size() for t in load_file(compressed / "model.safetensors").values())
    assert sum(row["nbytes"] for row in found["units"]) == stored - 2 * 48  # the final norm belongs to no unit
    for row in found["units"]:
        assert (row["kept"] == 0) == (not row["formats"])
        assert (row["kept"] is None) == (row["unit"] in {"embed", "head"})
    heads = sum(plan.widths.get(f"blocks.{i}.attn.kv", 3) for i in range(3))
    assert found["kv_cache"]["nbytes"] == found["kv_cache"]["bf16_nbytes"] == heads * 2 * 2048 * 16
    code, out, err = run("show", compressed)
    assert code == 0, err
    assert "blocks.2.mlp" in out
    assert f"{plan.found_by.nbytes:,} bytes of 30,000" in " ".join(out.split())


def test_what_it_prints(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run("show", write_result(tmp_path / "out"), "--context", 100)
    assert code == 0, err
    assert "2.0 MB → 535.0 kB (3.7x), 4.28 bits a parameter, KL 0.155 nats a token" in out
    assert "535,000 bytes of 540,000 (99.07 %); knapsack, pruning cost x1" in out
    for words in ("q k: uint4g32", "dropped", "0.2612", "1,234.0", "2.0 GB", "KV cache@100: 3,200 bytes", "a note of"):
        assert words in out


def test_json(run, tmp_path):
    code, out, err = run("show", write_result(tmp_path / "out"), "--context", 100, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found == json.loads((tmp_path / "out" / "run.json").read_text()) | {
        "bf16_nbytes": 2_000_000,
        "bits_per_parameter": 4.28,
        "kv_cache": found["kv_cache"],
    }
    assert found["kv_cache"].keys() == {
        "precision", "head_dim", "heads", "windows", "context", "nbytes", "bf16_nbytes",
    }  # fmt: skip
    assert (found["kv_cache"]["context"], found["kv_cache"]["nbytes"]) == (100, 3200)


def test_a_directory_without_a_budget(run, tmp_path):
    code, out, err = run("show", write_result(tmp_path / "out", budget=None))
    assert code == 0, err
    assert "535,000 bytes; knapsack" in out


def test_an_edited_plan(run, refused, tmp_path):
    folder = write_result(tmp_path / "out")
    made, edited = make_plan(), make_plan(biases=("q",))
    (folder / "plan.json").write_text(edited.to_json())
    refused("show", folder, words=["plan.json was edited", edited.content, made.content, "trimbit apply"])
    (folder / "plan.json").write_text(made.with_provenance(method="renamed").to_json())  # that is no other model
    assert run("show", folder)[0] == 0


@pytest.mark.parametrize("nbytes", [NBYTES - 100, NBYTES + 1])
def test_weights_of_another_size(refused, tmp_path, nbytes):
    folder = write_result(tmp_path / "out")
    (folder / "model.safetensors").write_bytes(bytes(nbytes))
    refused("show", folder, words=["the weight files have", f"{nbytes:,}", "run.json says 535,000"])


@pytest.mark.parametrize("name", ["run.json", "plan.json"])
def test_a_missing_or_unreadable_file(refused, tmp_path, name):
    folder = write_result(tmp_path / "out")
    (folder / name).write_text('{"nbytse": 3}')
    refused("show", folder, words=[f"{name}: "])
    (folder / name).unlink()
    refused("show", folder, words=[name, "No such file"])


def test_show_and_eval_of_what_is_no_model(refused, job, tmp_path):
    refused("show", job.model, words=["is not a compressed directory"])
    refused("show", tmp_path / "nonesuch", words=["is not a compressed directory"])
    refused("eval", tmp_path / "nonesuch", "--text", job.text, words=["does not exist"])
    refused("eval", job.model, "--text", job.text, "--dtype", "float8", words=["--dtype float8", "bfloat16 or float32"])
