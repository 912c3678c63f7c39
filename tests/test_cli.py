"""The command line: its options, its results on stdout, and errors in one line that leave nothing behind."""

import json
import math
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import trimbit
from jobs import BUDGET, write_text
from tiny import save_tiny, tiny_model
from trimbit.artifact import writer as writers
from trimbit.artifact.files import weight_nbytes
from trimbit.cli import main as cli
from trimbit.errors import DataError
from trimbit.pipeline import session as pipeline
from trimbit.pipeline.prepare import module_of
from trimbit.pipeline.recipes import load_recipe, names
from trimbit.pipeline.session import open_session
from trimbit.schema.budget import Budget
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import load_plan
from trimbit.trial import applied as trials

SEARCHING = ["--budget", "--calibration", "--dry-run", "--recipe", "--seed", "--set"]
OPTIONS = {
    "compress": (["model", "out"], SEARCHING),
    "plan": (["model", "out"], SEARCHING),
    "apply": (["model", "plan_file", "out"], ["--calibration", "--recipe", "--seed", "--set"]),
    "eval": (
        ["model"],
        ["--against", "--context", "--dtype", "--json", "--limit", "--task-data", "--tasks", "--text", "--windows"],
    ),
    "show": (["path"], ["--context", "--json"]),
    "recipes": (["name"], ["--set"]),
}


def test_commands_and_options_are_frozen():
    commands = typer.main.get_command(cli.app).commands
    found = {}
    for name, command in commands.items():
        arguments = [p.name for p in command.params if p.param_type_name == "argument"]
        options = [opt for p in command.params if p.param_type_name == "option" for opt in (*p.opts, *p.secondary_opts)]
        found[name] = (arguments, sorted(options))
    assert found == OPTIONS


@pytest.mark.parametrize("command", [[], *([name] for name in OPTIONS)])
def test_help(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, trimbit.__version__)


def test_recipes(run):
    code, out, _ = run("recipes")
    assert code == 0
    for name in names():
        assert name in out


@pytest.mark.parametrize("name", names())
def test_a_recipe_spelled_out_is_the_recipe(run, tmp_path, name):
    """With every parameter; as a file it is the same one."""
    code, out, err = run("recipes", name)
    assert code == 0, err
    (tmp_path / "own.yaml").write_text(out)
    assert run("recipes", tmp_path / "own.yaml")[1] == out
    fields = yaml.safe_load(out)
    assert fields["search"]["params"].keys() == module_of("search", load_recipe(name).search).Config.model_fields.keys()


@pytest.fixture
def run(monkeypatch, capfd):
    """Run `main`; gives the exit code, stdout and stderr."""

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["trimbit", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capfd.readouterr()
        return code, out, err

    return go


@pytest.fixture(scope="module")
def compressed(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "small"
    session = open_session(job.model, load_recipe(str(job.recipe)), calibration=str(job.text))
    pipeline.compress(session, Budget.parse(BUDGET), out)
    return out


@pytest.fixture
def options(job):
    return ["--recipe", job.recipe, "--calibration", job.text]


# --- what works ------------------------------------------------------------------------------------------------------


def test_compress(run, job, options, compressed, tmp_path):
    code, out, err = run("compress", job.model, tmp_path / "out", "--budget", BUDGET, *options)
    assert code == 0, err
    nbytes = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert f"{nbytes:,} bytes of 30,000" in out.replace("\n", "")
    assert "KL to the original" in out
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (compressed / "model.safetensors").read_bytes()


def test_plan_then_apply_is_compress(run, job, options, compressed, tmp_path):
    code, _, err = run("plan", job.model, tmp_path / "plan.json", "--budget", BUDGET, *options)
    assert code == 0, err
    assert load_plan(tmp_path / "plan.json") == load_plan(compressed / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    code, _, err = run("apply", job.model, tmp_path / "plan.json", tmp_path / "out", *options)
    assert code == 0, err
    for file in compressed.iterdir():
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


def test_eval_prints_json(run, job, compressed):
    arguments = ["--text", job.text, "--context", 32, "--windows", 3, "--against", job.model, "--dtype", "float32"]
    code, out, err = run("eval", compressed, *arguments, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert math.isfinite(found["ppl"])
    assert found["kl"] >= 0
    assert (found["context"], found["windows"], found["tokens"]) == (32, 3, 93)
    assert found["weight_nbytes"] == (compressed / "model.safetensors").stat().st_size
    assert found.keys() == {
        "schema_version", "model", "against", "text", "context", "windows", "tokens", "ppl", "kl", "top1_agreement",
        "kv_cache", "kv_cache_nbytes", "kv_cache_bf16_nbytes",
        "weight_nbytes", "bits_per_weight", "peak_rss_nbytes", "prefill_tokens_per_second", "decode_tokens_per_second",
        "dtype", "hardware", "threads", "versions",
    }  # fmt: skip
    code, out, err = run("eval", compressed, *arguments)
    assert code == 0, err
    assert "ppl@32" in out
    code, out, err = run("eval", job.model, "--text", job.text, "--context", 32, "--json")
    assert code == 0, err
    assert json.loads(out)["kl"] is None


@pytest.fixture
def task_data(tmp_path):
    """A folder with the files of two tasks."""
    pytest.importorskip("lm_eval")
    piqa = {"goal": "w3 w4", "sol1": "w5", "sol2": "w6 w7 w8", "label": 1}
    winogrande = {"sentence": "w3 _ w4", "option1": "w5", "option2": "w6", "answer": "1"}
    for name, row in (("piqa_validation", piqa), ("winogrande_xl_validation", winogrande)):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    return tmp_path


TASKS = {
    "schema_version", "model", "task_data", "task_limit", "tasks", "task_mean", "dtype", "hardware", "threads",
    "versions",
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
        "bf16_nbytes": heads * 2 * 100 * 16,
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


# --- what does not ---------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(run, tmp_path):
    """Run a command that must fail; stderr is one line with these words, and no output or half of one is left."""

    def go(*arguments, words, code=1, out="out"):
        before = {path.name for path in tmp_path.iterdir()}
        got, stdout, err = run(*arguments)
        error = [line for line in err.splitlines() if line.startswith("trimbit: ")]
        assert (got, len(error)) == (code, 1), err
        assert err.splitlines()[-1] == error[0]
        assert "Traceback" not in err
        assert stdout == ""
        for word in words:
            assert word in error[0], error[0]
        assert {path.name for path in tmp_path.iterdir()} == before
        assert not list(tmp_path.glob(".*partial*"))
        return error[0]

    return go


def copied(job, folder):
    """A model that a test may break."""
    shutil.copytree(job.model, folder / "model")
    return folder / "model"


def changed(model, change):
    state = load_file(model / "model.safetensors")
    change(state)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def compress(model, out, options, *more, budget=BUDGET):
    return ["compress", model, out, "--budget", budget, *options, *more]


def test_a_missing_model(refused, options, tmp_path):
    refused(*compress(tmp_path / "nonesuch", tmp_path / "out", options), words=["nonesuch", "does not exist"])


def test_a_truncated_file(refused, job, options, tmp_path):
    file = copied(job, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(*compress(file.parent, tmp_path / "out", options), words=["model.safetensors", "truncated or corrupt"])


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


def test_kl_is_to_the_original(run, refused, caplog, job, compressed, tmp_path):
    save_tiny(tiny_model("llama", seed=1).bfloat16(), tmp_path / "other")
    config = AutoConfig.from_pretrained(job.model)
    config.vocab_size = 80
    save_tiny(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tmp_path / "narrower")
    text = ["--text", job.text, "--context", 32]
    assert run("eval", compressed, *text, "--against", job.model)[0] == 0
    assert "was made from other files than" not in caplog.text
    assert run("eval", compressed, *text, "--against", tmp_path / "other")[0] == 0
    assert "was made from other files than" in caplog.text
    refused("eval", job.model, *text, "--against", tmp_path / "narrower", words=["vocabularies of other sizes"])
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
    refused("show", tmp_path / "cut", words=["cut", "the weight files have", "the plan says"])


def test_what_was_found_on_a_text_is_told_if_the_tasks_fail(run, job, task_data, monkeypatch):
    def fails(*_args, **_kwargs):
        raise DataError("no tasks today")

    monkeypatch.setattr("trimbit.evaluate.lm_eval.evaluate_tasks", fails)
    text = ["--text", job.text, "--context", 32, "--windows", 1]
    code, out, err = run("eval", job.model, *text, "--tasks", "piqa", "--task-data", task_data)
    assert code == 1
    assert "ppl@32" in out
    assert "no tasks today" in err


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
    words = ["kv_cache", "a group of 64 channels", "head_dim is 8"]
    refused(*compress(job.model, tmp_path / "out", options, "--set", "kv_cache.group=64"), words=words)
    refused(*compress(job.model, tmp_path / "out", options, "--set", "kv_cache.bits=9"), words=["kv_cache.bits: "])
    fields = json.loads((compressed / "plan.json").read_text()) | {"kv_cache": {"group": 64}}
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    refused("apply", job.model, tmp_path / "plan.json", tmp_path / "out", *options, words=words)


def test_text_shorter_than_a_window(refused, job, tmp_path):
    write_text(tmp_path / "short.txt", 20)
    short = ["--recipe", job.recipe, "--calibration", tmp_path / "short.txt"]
    refused(*compress(job.model, tmp_path / "out", short), words=["short.txt", "20 tokens found, 32 needed"])
    write_text(tmp_path / "short.txt", 100)
    refused(*compress(job.model, tmp_path / "out", short), words=["short.txt", "14 rows of 32", "has 3"])
    few = ["--text", tmp_path / "short.txt", "--context", 128]
    refused("eval", job.model, *few, words=["short.txt", "100 tokens found, 128 needed"])


def test_no_such_text(refused, job, tmp_path):
    missing = ["--recipe", job.recipe, "--calibration", tmp_path / "nonesuch.txt"]
    refused(*compress(job.model, tmp_path / "out", missing), words=["nonesuch.txt"])
    refused("eval", job.model, "--text", tmp_path / "nonesuch.txt", words=["nonesuch.txt", "no such file"])


def test_h_that_is_not_positive_definite(refused, job, options, tmp_path):
    """64 tokens cannot tell 80 channels apart."""
    few = ["quant.damping=0", "calibration.rows=4", "calibration.length=16"]
    sets = [part for one in few for part in ("--set", one)]
    error = refused(
        *compress(job.model, tmp_path / "out", options, *sets), words=["not positive definite", "damping 0"]
    )
    assert "a damping of" in error
    assert "model.layers." in error


@pytest.fixture
def untried(tmp_path_factory, monkeypatch):
    """A cache in which nothing was tried yet, and in which a trial that breaks off leaves nothing."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TRIMBIT_CACHE", str(cache))
    yield
    assert not list(cache.glob("trials/*"))
    assert not list(cache.glob("trials/.*"))


@pytest.fixture
def tried(run, job, options, tmp_path_factory):
    """The cache of the test run, in which the job's plans were tried."""
    run(*compress(job.model, tmp_path_factory.mktemp("tried") / "out", options))


@pytest.mark.usefixtures("tried")
@pytest.mark.parametrize("step", ["shutil.copyfile", "trimbit.pipeline.session.model_card"])
def test_no_space_left_or_interrupted_while_the_output_is_filled(refused, job, options, tmp_path, monkeypatch, step):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, stop)
    refused(*compress(job.model, tmp_path / "out", options), words=["interrupted"], code=130)
    monkeypatch.setattr(step, full)
    refused(*compress(job.model, tmp_path / "out", options), words=["No space left on device"])


@pytest.mark.usefixtures("untried")
def test_a_gpu_without_memory_left_is_said(refused, job, options, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee more")

    monkeypatch.setattr(trials, "apply_plan", full)
    words = ["trimbit: CUDA out of memory. Tried to allocate 20.00 GiB. Finished stages are kept"]
    refused(*compress(job.model, tmp_path / "out", options), words=words)


@pytest.mark.usefixtures("untried")
def test_no_space_left(refused, job, options, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers, "save_file", full)
    refused(*compress(job.model, tmp_path / "out", options), words=["cannot write", "No space left on device"])


@pytest.mark.parametrize("module", ["calibrate.stats", "trial.candidates"])
def test_no_space_left_for_the_cache(refused, job, options, tmp_path, monkeypatch, module):
    def full(_tensors, path, *_args):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path))
    (tmp_path / "tokens").mkdir()
    for folder in ("stats", "rankings", "candidates", "measurements"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(f"trimbit.{module}.save_file", full)
    refused(*compress(job.model, tmp_path / "out", options), words=["No space left on device"])
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cache_that_safetensors_cannot_write_or_read(refused, job, options, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    cache = tmp_path / "cache"
    monkeypatch.setenv("TRIMBIT_CACHE", str(cache))
    cache.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("trimbit.calibrate.stats.save_file", full)
        refused(*compress(job.model, tmp_path / "out", options), words=[str(cache), "No space left", "free space"])
    with monkeypatch.context() as patched:
        patched.setattr(trials, "apply_plan", full)
        refused(*compress(job.model, tmp_path / "out", options), words=[])
    for file in cache.rglob("candidates/*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])  # a disk that lost what it had been given
    for file in cache.rglob("*.jsonl"):
        file.unlink()
    refused(*compress(job.model, tmp_path / "out", options), words=[str(cache), "damaged", "remove it"])


@pytest.mark.usefixtures("untried")
def test_interrupted(refused, job, options, tmp_path, monkeypatch):
    def stop(_stream, _plan, _tokens, _method, _repair, _stats, writer, *_):
        assert writer.partial.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "apply_plan", stop)
    refused(*compress(job.model, tmp_path / "out", options), words=["interrupted", "reused"], code=130)


@pytest.mark.usefixtures("untried")
def test_terminated(refused, job, options, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "apply_plan", lambda *_: signal.raise_signal(signal.SIGTERM))
    refused(*compress(job.model, tmp_path / "out", options), words=["interrupted"], code=130)


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_an_output_that_exists(refused, job, options, tmp_path, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    refused(command, job.model, tmp_path / "out", "--budget", BUDGET, *options, words=["out exists already"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_an_output_needs_a_folder_to_lie_in(refused, job, options, tmp_path, command):
    (tmp_path / "file").write_text("")
    words = [f"cannot write {tmp_path / 'file' / 'out'}", "no directory"]
    refused(command, job.model, tmp_path / "file" / "out", "--budget", BUDGET, *options, words=words)


def test_a_plan_is_applied_by_its_own_recipe_and_seed(run, job, options, tmp_path):
    """To the same bytes as by `compress`; on another text only if one is named; an edited one as what it is now."""
    plan = tmp_path / "new" / "plan.json"
    given = [*options, "--seed", 3, "--budget", BUDGET]
    for command, out in (("plan", plan), ("compress", tmp_path / "out")):
        assert run(command, job.model, out, *given)[0] == 0
    code, _, err = run("apply", job.model, plan, tmp_path / "none")
    assert code != 0
    assert f"found on {job.text.name}: give that file" in err
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


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["compress"], "Missing argument"),
        (["compress", "a"], "Missing argument 'out'"),
        (["compress", "a", "b", "--budget", "1MB", "--bugdet", "2"], "No such option"),
        (["squeeze"], "No such command 'squeeze'"),
        (["compress", "a", "b", "--budget", "1MB", "--seed", "x"], "Invalid value for '--seed'"),
    ],
)
def test_wrong_arguments(refused, arguments, word):
    refused(*arguments, words=[word], code=2)


def test_show_and_eval_of_what_is_no_model(refused, job, tmp_path):
    refused("show", job.model, words=["is not a compressed directory"])
    refused("show", tmp_path / "nonesuch", words=["is not a compressed directory"])
    refused("eval", tmp_path / "nonesuch", "--text", job.text, words=["does not exist"])
    refused("eval", job.model, "--text", job.text, "--dtype", "float8", words=["--dtype float8", "bfloat16 or float32"])


def test_eval_of_nothing_or_of_unknown_tasks(refused, job, task_data):
    refused("eval", job.model, words=["--text FILE", "--tasks NAMES"])
    refused("eval", job.model, "--tasks", "piqa,mmlu", words=["no task 'mmlu'", "known are boolq"])
    tasks = ["--tasks", "piqa,boolq", "--task-data", task_data]
    refused("eval", job.model, *tasks, words=[str(task_data), "boolq_superglue_validation.jsonl"])
    refused("eval", job.model, "--tasks", "piqa", "--limit", 0, words=["limit is 0"])
    refused("eval", job.model, "--tasks", "piqa", "--against", job.model, words=["--against", "--text FILE"])
    refused("eval", job.model, "--text", job.text, "--limit", 5, words=["--limit", "--tasks NAMES"])
