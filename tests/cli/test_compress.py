"""`compress`, `plan` and `apply` by the command line."""

import json

import pytest

from jobs import BUDGET
from trimbit.artifact.files import weight_nbytes
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import load_plan


def test_compress(run, job, options, compressed, tmp_path):
    code, out, err = run("compress", job.model, tmp_path / "out", "--budget", BUDGET, *options)
    assert code == 0, err
    nbytes = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert f"{nbytes:,} bytes of 30,000" in out
    assert "nats a token" in out
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (compressed / "model.safetensors").read_bytes()


def test_plan_then_apply_is_compress(run, job, options, compressed, tmp_path):
    code, _, err = run("plan", job.model, tmp_path / "plan.json", "--budget", BUDGET, *options)
    assert code == 0, err
    assert load_plan(tmp_path / "plan.json") == load_plan(compressed / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    code, _, err = run("apply", job.model, tmp_path / "plan.json", tmp_path / "out", *options)
    assert code == 0, err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in compressed.iterdir()}
    for file in compressed.iterdir():
        if file.name == "run.json":  # has times in it
            continue
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_self_calibration(run, job, tmp_path):
    code, _, err = run("compress", job.model, tmp_path / "out", "--budget", BUDGET, "--recipe", job.recipe)
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 30_000


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_a_dry_run_writes_nothing(run, job, options, tmp_path, monkeypatch, command):
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path / "cache"))
    code, out, err = run(command, job.model, tmp_path / "out", "--budget", BUDGET, "--dry-run", *options)
    assert code == 0, err
    assert "nothing was written" in out
    assert "30,000" in out
    assert list(tmp_path.iterdir()) == []
    code, _, err = run(command, job.model, tmp_path / "out", "--budget", "1kB", "--dry-run", *options)
    assert code == 1
    assert "smallest feasible budget" in err


def test_a_packed_cache_from_the_recipe_to_generation(run, job, options, compressed, tmp_path):
    sets = ["--set", "kv_cache.group=8", "--set", "kv_cache.sink_tokens=2", "--set", "kv_cache.recent_tokens=8"]
    code, out, err = run("compress", job.model, tmp_path / "out", "--budget", BUDGET, *options, *sets)
    assert code == 0, err
    plan, before = load_plan(tmp_path / "out" / "plan.json"), load_plan(compressed / "plan.json")
    assert plan.kv_cache == KVPrecision(bits=4, group=8, sink_tokens=2, recent_tokens=8)
    assert (plan.cuts, plan.weights) == (before.cuts, before.weights)
    heads = sum(plan.widths.get(f"blocks.{i}.attn.kv", 3) for i in range(3))

    def nbytes(context):
        return heads * 2 * (10 * 8 * 2 + (context - 10) * (4 + 2 + 2))

    assert f"KV cache@2048: {nbytes(2048):,} bytes, {heads * 2 * 2048 * 16:,} in bf16 (4 bits, group 8" in out
    assert "4 bits, group 8, the first 2 and last 8" in (tmp_path / "out" / "README.md").read_text()
    code, out, err = run("show", tmp_path / "out", "--context", 100, "--json")
    assert code == 0, err
    assert json.loads(out)["kv_cache"] == {
        "precision": plan.kv_cache.model_dump(), "context": 100, "nbytes": nbytes(100),
        "bf16_nbytes": heads * 2 * 100 * 16, "head_dim": 8, "windows": [None] * 3,
        "heads": [plan.widths.get(f"blocks.{i}.attn.kv", 3) for i in range(3)],
    }  # fmt: skip
    arguments = ["--text", job.text, "--context", 64, "--windows", 3, "--against", job.model, "--dtype", "float32"]
    measured = {}
    for name, folder in {"packed": tmp_path / "out", "exact": compressed, "original": job.model}.items():
        code, out, err = run("eval", folder, *arguments, "--json")
        assert code == 0, err
        measured[name] = json.loads(out)
    assert measured["packed"]["kv_cache"] == plan.kv_cache.model_dump()
    assert measured["packed"]["kv_cache_nbytes"] == nbytes(64)
    assert measured["packed"]["kv_cache_bf16_nbytes"] == heads * 2 * 64 * 16 == measured["exact"]["kv_cache_nbytes"]
    assert measured["original"]["kv_cache_nbytes"] == 3 * 3 * 2 * 64 * 16
    assert measured["packed"]["ppl"] != measured["exact"]["ppl"]
    assert measured["packed"]["ppl"] == pytest.approx(measured["exact"]["ppl"], rel=0.02)
    code, out, err = run("eval", tmp_path / "out", *arguments)
    assert code == 0, err
    assert "KV cache@64" in out


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_an_output_that_exists(refused, job, options, tmp_path, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    refused(command, job.model, tmp_path / "out", "--budget", BUDGET, *options, words=["out already exists"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_an_output_needs_a_folder_to_lie_in(refused, job, options, tmp_path, command):
    (tmp_path / "file").write_text("")
    words = [f"cannot write {tmp_path / 'file' / 'out'}", "is not a writable directory"]
    refused(command, job.model, tmp_path / "file" / "out", "--budget", BUDGET, *options, words=words)


def test_a_plan_is_applied_by_its_own_recipe_and_seed(run, job, options, tmp_path):
    """To the same bytes as by `compress`; on another text only if one is named; an edited one as what it is now."""
    plan = tmp_path / "new" / "plan.json"
    given = [*options, "--seed", 3, "--budget", BUDGET]
    for command, out in (("plan", plan), ("compress", tmp_path / "out")):
        assert run(command, job.model, out, *given)[0] == 0
    code, _, err = run("apply", job.model, plan, tmp_path / "none")
    assert code != 0
    assert f"found on {job.text.name}; give that file" in err
    assert run("apply", job.model, plan, tmp_path / "again", "--calibration", job.text)[0] == 0
    for name in ("model.safetensors", "recipe.yaml", "plan.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    fields, other = json.loads(plan.read_text()), tmp_path / "other.json"
    fields["weights"] |= {
        name: [{"count": run["count"], "precision": "uint8row"} for run in runs]
        for name, runs in fields["weights"].items()
    }
    other.write_text(json.dumps(fields))
    code, out, err = run("apply", job.model, other, tmp_path / "edited", "--calibration", job.text)
    assert code == 0, err
    assert "edited, once: " in out
    plain = ["--recipe", "uniform-rtn", "--budget", "0.5x"]  # needs no text
    assert run("plan", job.model, tmp_path / "rtn.json", *options, *plain)[0] == 0
    assert run("apply", job.model, tmp_path / "rtn.json", tmp_path / "rtn")[0] == 0
    written = load_plan(tmp_path / "edited" / "plan.json")
    assert written.found_by.nbytes == weight_nbytes(tmp_path / "edited")
