"""Whole runs on a tiny llama: within the budget, the same each time, loadable by plain transformers."""

import itertools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimbit
from jobs import BUDGET
from plans import make_plan, runs
from tiny import VOCAB
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import ArtifactError, BudgetError, DataError, PlanError, RecipeError
from trimbit.evaluate.perplexity import evaluate, final_hidden, read_hidden, score
from trimbit.measure.choices import background_of
from trimbit.pipeline import prepare as preparation
from trimbit.pipeline.recipes import load_recipe, read_recipe
from trimbit.pipeline.session import compress, open_session
from trimbit.runtime.kv_cache import precision_of
from trimbit.schema.budget import Budget
from trimbit.schema.kv_cache import KVPrecision
from trimbit.schema.plan import load_plan
from trimbit.trial import applied as trials

LIMIT = Budget.parse(BUDGET).nbytes(1)


def session(job, *overrides, **fields):
    recipe = load_recipe(str(job.recipe), overrides)
    return open_session(job.model, recipe, **({"calibration": str(job.text)} | fields))


@pytest.fixture(scope="module")
def compressed(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("pipeline") / "small"
    plan = compress(session(job), Budget.parse(BUDGET), out)
    return out, plan


def test_within_the_budget_and_as_large_as_the_plan_says(job, compressed):
    out, plan = compressed
    nbytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert nbytes == plan.found_by.nbytes == session(job).layout.file_nbytes(plan) == weight_nbytes(out)
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
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), file.name


def test_another_seed_draws_other_text(job):
    first, second = session(job).tokens, session(job, seed=1).tokens
    assert first.digest != second.digest
    assert first.digest == session(job).tokens.digest


def test_evaluation_against_the_original(job, compressed):
    out, plan = compressed
    found = evaluate(
        out, job.text, context=32, limit=4, against=job.model, dtype=torch.float32, progress=lambda *_: None
    )
    assert math.isfinite(found.ppl)
    assert found.kl > 0
    assert 0 <= found.top1_agreement <= 1
    assert found.weight_nbytes == plan.found_by.nbytes
    parameters = session(job).layout.parameters
    assert found.bits_per_weight == pytest.approx(8 * plan.found_by.nbytes / parameters)
    same = evaluate(
        job.model, job.text, context=32, limit=4, against=job.model, dtype=torch.float32, progress=lambda *_: None
    )
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1_agreement == 1
    assert same.windows == 4
    assert same.tokens == 4 * 31


def test_perplexity_and_kl_equal_full_logits(job, compressed):
    out, _ = compressed
    found = evaluate(
        out, job.text, context=50, limit=3, against=job.model, dtype=torch.float32, progress=lambda *_: None
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


def test_the_measured_damage_is_that_of_the_written_model(job, compressed):
    out, plan = compressed
    held = session(job).held_out.tokens
    with torch.no_grad():
        small, large = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(held).logits.double().log_softmax(-1)
            for path in (out, job.model)
        )
    real = float((large.exp() * (large - small)).sum(-1).mean())
    assert plan.found_by.measured_damage == pytest.approx(real, rel=0.02)  # computed in bf16


def test_a_quick_evaluation_is_near_the_real_one(job, compressed):
    _, plan = compressed
    assert session(job).judging.evaluate(plan) == pytest.approx(plan.found_by.measured_damage, rel=0.5)


def test_held_out_tokens_are_other_tokens(job):
    opened = session(job)
    assert opened.held_out.tokens.shape == (2, 32)
    rows = {tuple(row) for row in opened.tokens.tokens.tolist()}
    assert len(rows) == 12
    assert not rows & {tuple(row) for row in opened.held_out.tokens.tolist()}


def test_a_trial_is_written_as_it_was_tried(job, compressed, tmp_path):
    """The chosen plan was applied to be tried; writing it copies. Applying it again gives the same bytes."""
    _, plan = compressed
    opened = session(job, cache=tmp_path / "cache")
    opened.write(plan, tmp_path / "first")
    assert not (tmp_path / "cache" / "trials").exists()
    assert opened.judging.trial(plan) == plan.found_by.measured_damage
    (folder,) = (tmp_path / "cache" / "trials").iterdir()
    opened.write(plan, tmp_path / "second")
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_another_cache_of_keys_and_values_tries_nothing_again(job, compressed, tmp_path, monkeypatch):
    out, plan = compressed
    monkeypatch.setattr(trials, "apply_plan", lambda *_: pytest.fail("applied again"))
    packed = compress(session(job, "kv_cache.bits=8"), Budget.parse(BUDGET), tmp_path / "small")
    assert packed.kv_cache == KVPrecision(bits=8)
    assert packed.found_by.measured_damage == plan.found_by.measured_damage
    assert load_plan(tmp_path / "small" / "plan.json") == packed
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert precision_of(AutoModelForCausalLM.from_pretrained(tmp_path / "small")) == packed.kv_cache


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
        out, job.text, context=48, limit=4, against=job.model, dtype=torch.float32, progress=lambda *at: told.append(at)
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


@pytest.mark.parametrize("name", ["uniform-rtn", "uniform-gptq", "knapsack-nopruning"])
def test_the_other_recipes(job, tmp_path, name):
    space = (
        "space.formats=[int2g32, int4g32]",
        "space.embedding_formats=[int4g32]",
        "search.uniform={formats: [int2g32, int4g32]}",
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


def test_rounds_and_compute_in_float32(job, tmp_path):
    opened = session(job, "measure.rounds=2", "compute=float32")
    assert compress(opened, Budget.parse(BUDGET), tmp_path / "out").found_by.nbytes <= LIMIT
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())


def test_self_calibration_is_repeatable(job, tmp_path):
    digests = []
    for name in ("first", "first", "second"):
        opened = session(job, calibration="self", cache=tmp_path / name)
        assert opened.tokens.tokens.shape == (12, 32)
        digests.append(opened.tokens.digest)
    assert len(set(digests)) == 1
    plan = compress(session(job, calibration="self", cache=tmp_path / "first"), Budget.parse(BUDGET), tmp_path / "out")
    assert plan.found_by.nbytes <= LIMIT
    assert "sampled from the model itself" in (tmp_path / "out" / "README.md").read_text()


def test_budgets_share_everything_but_the_search(job, tmp_path, monkeypatch):
    """A second budget measures nothing again."""
    opened = session(job, cache=tmp_path)
    opened.find_plan(Budget.parse("30kB"))
    monkeypatch.setattr(preparation, "collect", None)
    again = session(job, cache=tmp_path)
    journals = {file.name: file.read_bytes() for file in (tmp_path / "measurements").glob("*.jsonl")}
    assert len(journals) == 1
    assert again.find_plan(Budget.parse("26kB")).found_by.nbytes <= 26_000
    assert journals == {file.name: file.read_bytes() for file in (tmp_path / "measurements").glob("*.jsonl")}


def test_a_torn_journal_in_the_cache(job, tmp_path, compressed):
    _, plan = compressed
    session(job, cache=tmp_path).find_plan(Budget.parse(BUDGET))
    (journal,) = (tmp_path / "measurements").glob("*.jsonl")
    journal.write_bytes(journal.read_bytes()[: journal.stat().st_size // 2])
    assert session(job, cache=tmp_path).find_plan(Budget.parse(BUDGET)) == plan


def test_nothing_half_written_is_left_in_the_cache(job, tmp_path):
    compress(session(job, cache=tmp_path / "cache"), Budget.parse(BUDGET), tmp_path / "out")
    left = [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".tmp" or "partial" in path.name]
    assert left == []


def test_an_unready_budget_is_refused_before_anything_long(job, tmp_path):
    opened = session(job, cache=tmp_path / "cache")
    with pytest.raises(BudgetError, match="smallest feasible budget is") as caught:
        opened.find_plan(Budget.parse("1kB"))
    assert not (tmp_path / "cache").exists()
    smallest = str(caught.value).split("--budget ")[1].rstrip(")")
    assert opened.find_plan(Budget.parse(smallest)).found_by.nbytes == int(smallest[:-1])


def test_a_measured_search_without_moments(job, tmp_path):
    """Round to nearest needs no text, but the search does, and what it tries is judged."""
    recipe = ("quant.name=rtn", "criterion=null", "space.widths=[1.0]", "space.prune_kv_groups=false")
    plan = compress(session(job, *recipe), Budget.parse("40kB"), tmp_path / "out")
    assert plan.found_by.measured_damage > 0
    assert plan.cuts == {}


@pytest.mark.parametrize("missing", ["measure", "space"])
def test_a_search_that_needs_measurements(job, missing):
    with pytest.raises(RecipeError, match=r"search knapsack needs a `(space|measure)` in the recipe"):
        session(job, f"{missing}=null")


def test_a_plan_without_trials(job, tmp_path):
    """Another budget takes a solution and some quick evaluations; the damage is told once the plan is applied."""
    opened = session(job, "measure.apply_finalists=false", cache=tmp_path / "cache")
    plan = opened.find_plan(Budget.parse(BUDGET))
    assert not (tmp_path / "cache" / "trials").exists()
    assert plan.found_by.measured_damage is None
    assert sum(note.startswith("quick, ") for note in plan.found_by.notes) >= 2
    assert opened.write(plan, tmp_path / "out").found_by.measured_damage > 0


def test_without_trials_the_better_of_two_rounds_is_taken(job, tmp_path, monkeypatch):
    """The second round's plan is not thrown away for want of a real figure."""
    opened = session(job, "measure.apply_finalists=false", "measure.rounds=2", cache=tmp_path / "cache")
    search, rounds = opened.search[0].search, []

    def numbered(problem, config):
        plan = search(problem, config)
        rounds.append(f"round {len(rounds) + 1}")
        return plan.model_copy(update={"found_by": plan.found_by.model_copy(update={"method": rounds[-1]})})

    monkeypatch.setattr(opened.search[0], "search", numbered)
    monkeypatch.setattr(opened.judging, "evaluate", lambda plan: 0.1 if plan.found_by.method == "round 2" else 0.2)
    assert opened.find_plan(Budget.parse(BUDGET)).found_by.method == "round 2"


def test_a_damaged_trial_is_not_copied(job, compressed, tmp_path):
    _, plan = compressed
    opened = session(job, cache=tmp_path / "cache")
    opened.judging.trial(plan)
    (weights,) = (tmp_path / "cache" / "trials").glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"trials/.* is damaged; remove it"):
        opened.write(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_runs_that_try_the_same_plan(job, compressed, tmp_path, monkeypatch):
    _, plan = compressed
    first, second = (session(job, cache=tmp_path / name) for name in ("first", "second"))
    first.judging.trial(plan)
    apply = trials.apply_plan

    def meanwhile(*arguments):
        found = apply(*arguments)
        shutil.copytree(tmp_path / "first" / "trials", tmp_path / "second" / "trials", dirs_exist_ok=True)
        return found

    monkeypatch.setattr(trials, "apply_plan", meanwhile)
    assert second.judging.trial(plan) == plan.found_by.measured_damage
    assert len(list((tmp_path / "second" / "trials").iterdir())) == 1


def test_too_few_rows_to_measure_on(job):
    with pytest.raises(RecipeError, match=r"measure\.rows: 13 of 12 calibration rows asked"):
        session(job, "measure.rows=13")


def test_calibration_text_must_exist(job, tmp_path):
    with pytest.raises(DataError, match="no calibration text"):
        session(job, calibration=str(tmp_path / "nonesuch.txt"))


def test_an_existing_output_is_refused_first(job, compressed):
    out, _ = compressed
    before = json.loads((out / "config.json").read_text())
    with pytest.raises(ArtifactError, match="exists already"):
        compress(session(job), Budget.parse(BUDGET), out)
    assert json.loads((out / "config.json").read_text()) == before


def test_a_plan_of_another_model(job, compressed, tmp_path):
    _, plan = compressed
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"weights_hash": "0" * 64})})
    with pytest.raises(PlanError, match="belongs to original"):
        session(job).write(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_of_several_runs_is_no_background(job, compressed):
    _, plan = compressed
    name, own = next(iter(plan.weights.items()))
    halves = tuple(run.model_copy(update={"count": own[0].count // 2}) for run in own * 2)
    torn = plan.model_copy(update={"weights": {**plan.weights, name: halves}})
    with pytest.raises(PlanError, match=f"{name} has 2 runs"):
        background_of(torn, session(job).layout)


def test_a_recipe_that_fits_nothing_asks_for_no_text(job, tmp_path, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("text was asked for")

    monkeypatch.setattr(preparation.data, "sample_self", asked)
    recipe = load_recipe("uniform-rtn", ("search.formats=[uint4g32]",))
    compress(open_session(job.model, recipe, cache=tmp_path / "cache"), Budget.parse("60kB"), tmp_path / "out")
    assert weight_nbytes(tmp_path / "out") <= 60_000


def test_formats_below_two_bits_meet_a_budget_that_two_bits_do_not(job, tmp_path):
    menu = "[binaryrow, mbinaryrow, ternaryrow, int2row]"
    uniform = f"search.uniform={{formats: {menu}}}"
    fields = (f"formats={menu}", f"embedding_formats={menu}", "widths=[1.0]", "prune_kv_groups=false")
    opened = session(job, uniform, *(f"space.{field}" for field in fields))
    two = make_plan(opened.layout, lambda _, cols: runs((cols, "int2row")))
    limit = opened.layout.file_nbytes(two) - 500
    plan = compress(opened, Budget.parse(f"{limit}B"), tmp_path / "out")
    assert not plan.cuts
    assert {own[0].precision.name for own in plan.weights.values()} & {"binaryrow", "mbinaryrow", "ternaryrow"}
    assert weight_nbytes(tmp_path / "out") == plan.found_by.nbytes <= limit
    text = {"context": 32, "limit": 4, "dtype": torch.float32, "against": None, "progress": lambda *_: None}
    assert math.isfinite(evaluate(tmp_path / "out", job.text, **text).ppl)
