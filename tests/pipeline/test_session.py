"""Whole runs on a tiny llama: within the budget, the same each time, loadable by plain transformers."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimbit
from jobs import BUDGET
from plans import make_plan, runs
from sessions import LIMIT, compress, entries, open_session, session
from tiny import VOCAB
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import ArtifactError, BudgetError, PlanError
from trimbit.evaluate.perplexity import evaluate
from trimbit.model.resolved import resolve
from trimbit.pipeline.oracle import ModelOracle
from trimbit.pipeline.recipes import load_recipe, read_recipe
from trimbit.schema.budget import Budget
from trimbit.schema.found import Found
from trimbit.schema.plan import load_plan
from trimbit.schema.precision import parse_precision
from trimbit.search.methods import knapsack
from trimbit.search.solvers import knapsack as solver


def test_within_the_budget_and_as_large_as_the_plan_says(job, compressed):
    out, plan = compressed
    nbytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert nbytes == plan.found_by.nbytes == resolve(plan, session(job).layout).file_nbytes == weight_nbytes(out)
    assert nbytes <= LIMIT
    assert nbytes > 0.7 * LIMIT  # the search reckons with the longest header, which is much of so little
    assert load_plan(out / "plan.json") == plan
    assert plan.found_by.measured_damage > 0


def test_everything_lies_beside_the_weights(job, compressed):
    out, plan = compressed
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "plan.json",
        "recipe.yaml",
        "README.md",
        "LICENSE",
        "tokenizer.json",
    }
    assert not any("partial" in path.name for path in out.parent.iterdir())
    assert (out / "LICENSE").read_text() == "as you like"
    assert load_recipe(str(out / "recipe.yaml")) == load_recipe(str(job.recipe))
    assert read_recipe(plan.found_by.recipe, "plan") == load_recipe(str(job.recipe))
    card = (out / "README.md").read_text()
    assert f"{plan.found_by.nbytes:,} bytes" in card
    assert "text.txt" in card


def test_plain_transformers_loads_and_generates(compressed):
    out, _ = compressed
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("w5 w6 w7", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert made.shape == (1, 11)
    assert int(made.max()) < VOCAB
    assert trimbit.__version__


def test_the_same_seed_gives_the_same_bytes(job, compressed, tmp_path):
    """From the cache of the first run, and from an empty one."""
    out, plan = compressed
    for name, fields in {"again": {}, "afresh": {"cache": tmp_path / "cache"}}.items():
        assert compress(session(job, **fields), Budget.parse(BUDGET), tmp_path / name) == plan
        for file in out.iterdir():
            if file.name != "run.json":  # which says how long it took
                assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_measured_damage_is_that_of_the_written_model(job, compressed):
    out, plan = compressed
    held = session(job).text.report.tokens
    with torch.no_grad():
        small, large = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(held).logits.double().log_softmax(-1)
            for path in (out, job.model)
        )
    real = float((large.exp() * (large - small)).sum(-1).mean())
    assert plan.found_by.measured_damage == pytest.approx(real, rel=0.02)  # computed in bf16


def test_a_quick_evaluation_is_near_the_real_one(job, compressed):
    _, plan = compressed
    assert session(job).oracle.estimate_kl(plan) == pytest.approx(plan.found_by.measured_damage, rel=0.5)


@pytest.mark.parametrize("name", ["uniform-rtn", "uniform-gptq", "knapsack-nopruning"])
def test_the_other_recipes(job, tmp_path, name):
    space = (
        "space.formats=[int2g32, int4g32]",
        "space.embedding_formats=[int4g32]",
    )
    small = (
        "calibration.rows=8",
        "calibration.length=32",
        "measure.rows=2",
        "measure.length=16",
        "calibration.held_out=2",
    )
    overrides = {"uniform-rtn": small[:2], "uniform-gptq": small, "knapsack-nopruning": small + space}[name]
    opened = open_session(job.model, load_recipe(name, overrides), calibration=str(job.text))
    plan = compress(opened, Budget.parse("4.6bpw"), tmp_path / "out")
    assert plan.cuts == {}
    assert (
        weight_nbytes(tmp_path / "out")
        == plan.found_by.nbytes
        <= Budget.parse("4.6bpw").nbytes(opened.layout.parameters)
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)


@pytest.mark.slow
def test_rounds_and_compute_in_float32(job, tmp_path):
    opened = session(job, "measure.by=measured", "measure.rounds=2", "compute=float32")
    assert compress(opened, Budget.parse(BUDGET), tmp_path / "out").found_by.nbytes <= LIMIT
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())


def test_an_unready_budget_is_refused_before_anything_long(job, tmp_path):
    opened = session(job, cache=tmp_path / "cache")
    with pytest.raises(BudgetError, match="smallest feasible budget is") as caught:
        opened.find_plan(Budget.parse("1kB"))
    assert entries(tmp_path / "cache", "*") == []
    smallest = str(caught.value).split("--budget ")[1].rstrip(")")
    assert opened.find_plan(Budget.parse(smallest)).found_by.nbytes == int(smallest[:-1])


def test_a_measured_search_without_moments(job, tmp_path):
    """Round to nearest needs no text, but the search does, and what it tries is judged."""
    recipe = ("quant.name=rtn", "criterion=null", "space.widths=[1.0]", "space.prune_kv_groups=false")
    plan = compress(session(job, *recipe), Budget.parse("40kB"), tmp_path / "out")
    assert plan.found_by.measured_damage > 0
    assert plan.cuts == {}


def test_a_plan_without_trials(job, tmp_path):
    """Another budget takes a solution and some quick evaluations; the damage is told once the plan is applied."""
    opened = session(job, "measure.apply_finalists=false", cache=tmp_path / "cache")
    found = opened.found(Budget.parse(BUDGET))
    plan = found.plan
    assert entries(tmp_path / "cache", "applied") == []
    assert plan.found_by.measured_damage is None
    assert sum(one.estimated_kl is not None for one in found.tried) >= 2
    assert opened.write(plan, tmp_path / "out").found_by.measured_damage > 0


def test_without_trials_the_better_of_two_rounds_is_taken(job, tmp_path, monkeypatch):
    """The second round's plan is not thrown away for want of a real figure."""
    rounds_of_two = ("measure.by=measured", "measure.rounds=2", "measure.apply_finalists=false")
    opened = session(job, *rounds_of_two, cache=tmp_path / "cache")
    best_of, rounds = knapsack.best_of, []

    def numbered(problem, config, damage):
        found = best_of(problem, config, damage)
        rounds.append(f"round {len(rounds) + 1}")
        return found.model_copy(update={"plan": found.plan.with_provenance(method=rounds[-1])})

    monkeypatch.setattr(knapsack, "best_of", numbered)
    monkeypatch.setattr(ModelOracle, "estimate_kl", lambda _, plan: 0.1 if plan.found_by.method == "round 2" else 0.2)
    assert opened.find_plan(Budget.parse(BUDGET)).found_by.method == "round 2"


def test_a_search_that_exceeds_the_budget_is_stopped_by_the_house(job, tmp_path, monkeypatch):
    opened = session(job, cache=tmp_path / "cache")
    wide = opened.problem(10**9).uniform(parse_precision("uint8row"), "by hand")
    monkeypatch.setattr(knapsack, "best_of", lambda *_: Found(plan=wide))
    with pytest.raises(BudgetError, match=rf"found a plan of {wide.found_by.nbytes:,} bytes for a budget of 30,000"):
        opened.compress(Budget.parse(BUDGET), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_solver_that_stops_early_is_said_and_recorded(job, tmp_path, monkeypatch, caplog):
    real = solver.milp

    def early(*args, **kwargs):
        result = real(*args, **kwargs)
        result.mip_gap = 0.125
        return result

    monkeypatch.setattr(solver, "milp", early)
    opened = session(job, "measure.apply_finalists=false", cache=tmp_path / "cache")
    opened.compress(Budget.parse(BUDGET), tmp_path / "out")
    assert "a plan up to 12.5 % better may exist" in caplog.text
    assert json.loads((tmp_path / "out" / "run.json").read_text())["gap"] == 0.125


def test_an_existing_output_is_refused_first(job, compressed):
    out, _ = compressed
    before = json.loads((out / "config.json").read_text())
    with pytest.raises(ArtifactError, match="already exists"):
        compress(session(job), Budget.parse(BUDGET), out)
    assert json.loads((out / "config.json").read_text()) == before


def test_a_plan_of_another_model(job, compressed, tmp_path):
    _, plan = compressed
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"weights_hash": "0" * 64})})
    with pytest.raises(PlanError, match="belongs to original"):
        session(job).write(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_formats_below_two_bits_meet_a_budget_that_two_bits_do_not(job, tmp_path):
    menu = "[binaryrow, mbinaryrow, ternaryrow, int2row]"
    fields = (f"formats={menu}", f"embedding_formats={menu}", "widths=[1.0]", "prune_kv_groups=false")
    opened = session(job, *(f"space.{field}" for field in fields))
    two = make_plan(opened.layout, lambda _, cols: runs((cols, "int2row")))
    limit = resolve(two, opened.layout).file_nbytes - 500
    plan = compress(opened, Budget.parse(f"{limit}B"), tmp_path / "out")
    assert not plan.cuts
    assert {own[0].precision.name for own in plan.weights.values()} & {"binaryrow", "mbinaryrow", "ternaryrow"}
    assert weight_nbytes(tmp_path / "out") == plan.found_by.nbytes <= limit
    text = {"context": 32, "max_windows": 4, "dtype": torch.float32, "against": None, "progress": lambda *_: None}
    assert math.isfinite(evaluate(tmp_path / "out", job.text, **text).ppl)
