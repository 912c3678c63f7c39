"""`show` of a directory and of a plan."""

import json

from safetensors.torch import load_file

from trimbit.schema.plan import load_plan


def test_show(run, compressed):
    code, out, err = run("show", compressed, "--json")
    assert code == 0, err
    found, plan = json.loads(out), load_plan(compressed / "plan.json")
    assert found["found_by"]["nbytes"] == plan.found_by.nbytes
    assert [row["unit"] for row in found["units"]] == [
        "embed", *(f"blocks.{i}.{kind}" for i in range(3) for kind in ("attn", "mlp")), "head",
    ]  # fmt: skip
    stored = sum(t.numel() * t.element_size() for t in load_file(compressed / "model.safetensors").values())
    assert sum(row["nbytes"] for row in found["units"]) == stored - 2 * 48  # the final norm belongs to no unit
    for row in found["units"]:
        assert row["formats"] == "dropped" if row["kept"].startswith("0/") else row["formats"] != "dropped"
        assert row["kept"] != "" or row["unit"] in {"embed", "head"}
    code, out, err = run("show", compressed)
    assert code == 0, err
    assert "blocks.2.mlp" in out
    assert f"{plan.found_by.nbytes:,} bytes" in " ".join(out.split())


def test_show_and_eval_of_what_is_no_model(refused, job, tmp_path):
    refused("show", job.model, words=["is not a compressed directory"])
    refused("show", tmp_path / "nonesuch", words=["is not a compressed directory"])
    refused("eval", tmp_path / "nonesuch", "--text", job.text, words=["does not exist"])
    refused("eval", job.model, "--text", job.text, "--dtype", "float8", words=["--dtype float8", "bfloat16 or float32"])
