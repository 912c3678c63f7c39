"""QPruner's recipes whole, on a tiny llama: pruned, bits allocated, low-rank pairs trained in the quantised state."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qpruner_jobs import RECIPES, session
from sessions import compress, entries, open_session
from tiny import VOCAB
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import BudgetError, DataError, PlanError, RecipeError
from trimbit.model.resolved import resolve
from trimbit.pipeline.oracle import ModelOracle
from trimbit.pipeline.recipes import load_recipe
from trimbit.runtime.layers import PackedLinear
from trimbit.schema.budget import Budget
from trimbit.schema.plan import load_plan
from trimbit.schema.run import Run, TrainingRecord


@pytest.fixture(scope="module", params=RECIPES)
def compressed(request, job, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    opened = session(job, request.param, cache=folder / "cache")
    return opened, compress(opened, None, folder / "out"), folder / "out"


def test_as_large_as_the_plan_says_pairs_included(compressed):
    opened, plan, out = compressed
    assert weight_nbytes(out) == plan.found_by.nbytes == resolve(plan, opened.layout).file_nbytes
    assert plan == load_plan(out / "plan.json")
    weights = {name for name in plan.weights if name.startswith("model.layers.")}
    assert set(plan.adapters) == weights
    stored = load_file(out / "model.safetensors")
    for name in weights:
        assert stored[f"{name}.adapter.a"].shape[0] == stored[f"{name}.adapter.b"].shape[1] == 2
    assert plan.found_by.nbytes <= opened.budget_nbytes()


def test_loads_and_its_loss_fell(compressed):
    opened, plan, out = compressed
    model = AutoModelForCausalLM.from_pretrained(out)
    logits = model(torch.randint(3, VOCAB, (1, 9))).logits
    assert bool(logits.isfinite().all())
    record = json.loads((out / "tuning.json").read_text())
    assert len(record["losses"]) == 4
    assert record["losses"][-1] < record["losses"][0]
    assert record["optimizer_nbytes"] == 2 * record["trained_nbytes"]
    specs = resolve(plan, opened.layout).tensors()
    pairs = sum(spec.nbytes // 2 for name, spec in specs.items() if ".adapter." in name)
    assert record["trained_nbytes"] == 4 * pairs
    run = Run.model_validate_json((out / "run.json").read_text())
    assert run.training == (
        TrainingRecord(
            what="pairs", steps=4, first_loss=record["losses"][0], last_loss=record["losses"][-1],
            trained_nbytes=record["trained_nbytes"], optimizer_nbytes=record["optimizer_nbytes"],
        ),
    )  # fmt: skip


def test_the_pruned_ratio_and_the_spared_block(compressed):
    opened, plan, _ = compressed
    if opened.recipe.prune is None:
        assert not plan.cuts
        return
    assert plan.cuts
    assert not any(dim.startswith("blocks.0.") for dim in plan.cuts)
    spared = "bf16" if opened.recipe.space is None else "int8row"
    assert {plan.weights[name][0].precision.name for name in plan.weights if ".0." in name} == {spared}


def test_bits_follow_importance(job, tmp_path):
    opened = session(job, "qpruner-2", "search.share=0.5", cache=tmp_path)
    plan = opened.find_plan(None)
    eight = {name.split(".")[2] for name, runs in plan.weights.items() if runs[0].precision.name == "int8row"}
    ranked = sorted(("1", "2"), key=lambda block: opened.oracle.importance()[f"blocks.{block}"])
    assert eight == {"0", ranked[-1]}  # the first block is spared


def test_what_was_tried_lies_beside(compressed):
    opened, plan, out = compressed
    if opened.recipe.search.name != "bayes":
        assert not (out / "trials.csv").exists()
        return
    header, *rows = (out / "trials.csv").read_text().splitlines()
    assert header == "trial,nbytes,kl,nll,accuracy,stderr,pareto"
    split = [row.split(",") for row in rows]
    assert all(float(nll) > 1 and (accuracy, stderr) == ("", "") for _, _, _, nll, accuracy, stderr, _ in split)
    found = [(int(nbytes), float(kl), int(front)) for _, nbytes, kl, *_, front in split]
    limit = opened.budget_nbytes()
    assert len(found) == 6 + 2
    assert all(nbytes <= limit for nbytes, _, _ in found)
    for nbytes, kl, front in found:
        beaten = any(n <= nbytes and k <= kl and (n, k) != (nbytes, kl) for n, k, _ in found)
        better = any(f and abs(n - nbytes) < 4096 and k <= kl for n, k, f in found)  # and as good as of the same size
        assert not (front and beaten)
        assert front or beaten or better
    assert any(front for *_, front in found)
    assert plan.found_by.nbytes == min(found, key=lambda one: one[1])[0]
    assert (out / "trials.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_search_that_was_broken_off_goes_on(job, tmp_path, monkeypatch):
    """Killed at every trial, it tries nothing twice and ends with the same plan."""
    whole = session(job, "qpruner-3", cache=tmp_path / "one").found()
    calls, real = [], ModelOracle.outcome
    for _ in range(9):
        killed = []

        def once(self, plan, objective, killed=killed):
            if killed:
                raise KeyboardInterrupt
            killed.append(1)
            calls.append(plan.weights)
            return real(self, plan, objective)

        monkeypatch.setattr(ModelOracle, "outcome", once)
        try:
            found = session(job, "qpruner-3", cache=tmp_path / "two").found()
            break
        except KeyboardInterrupt:
            continue
    assert found == whole
    assert len(calls) == len(whole.tried) == 6 + 2
    assert all(a != b for at, a in enumerate(calls) for b in calls[:at])


@pytest.mark.parametrize(
    ("name", "overrides", "error", "says"),
    [
        ("qpruner-1", ["prune.ratio=0.9"], RecipeError, "leaves no feed-forward"),
        ("qpruner-1", ["criterion=null"], RecipeError, "needs a `criterion`"),
        ("qpruner-1", ["criterion.name=mutual_information"], RecipeError, "does not offer `score`"),
        ("qpruner-1", ["tune.data=missing.jsonl"], DataError, "missing.jsonl"),
        ("qpruner-2", ["importance=null"], RecipeError, "needs a `importance`"),
        ("qpruner-3", ["measure=null"], RecipeError, "needs a `measure`"),
        ("qpruner-3", ["space=null"], RecipeError, "needs a `space`"),
        ("qpruner-1", ["tune.loss=instruct"], RecipeError, "needs tune.data"),
        ("qpruner-1", ["lowrank=null"], RecipeError, "needs a `lowrank`"),
        ("qpruner-1", ["lowrank.rank=40"], RecipeError, "rank 40 does not fit a weight of"),
        ("qpruner-2", ["space.formats=[]"], RecipeError, "space.formats is empty"),
        ("qpruner-2", ["space.channel_multiple=0"], RecipeError, "greater than or equal to 1"),
        ("qpruner-2", ["space.widths=[2.0]"], RecipeError, "less than or equal to 1"),
        ("qpruner-2", ["criterion.samples=99"], RecipeError, "99 samples of 32 tokens"),
    ],
)
def test_bad_recipes(job, tmp_path, name, overrides, error, says):
    """Before anything is made."""
    with pytest.raises(error, match=says):
        compress(session(job, name, *overrides, cache=tmp_path / "cache"), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert entries(tmp_path / "cache", "*") == []


@pytest.mark.parametrize("name", ["qpruner-2", "qpruner-3"])
def test_a_budget_below_all_lowest_names_the_smallest_and_that_one_fits(job, tmp_path, name):
    with pytest.raises(BudgetError, match="smallest feasible budget") as err:
        session(job, name, cache=tmp_path).find_plan(Budget.parse("20kB"))
    smallest = str(err.value).split("--budget ")[1].rstrip(")")
    found = session(job, name, cache=tmp_path).find_plan(Budget.parse(smallest))
    assert found.found_by.nbytes == int(smallest.removesuffix("B"))


@pytest.mark.slow
def test_another_estimator_is_another_search(job, tmp_path, monkeypatch):
    """Its importance is another, but what was measured of a plan is not measured again."""
    session(job, "qpruner-3", cache=tmp_path).find_plan()
    session(job, "qpruner-3", "importance.estimator=histogram", cache=tmp_path).find_plan()
    assert len(entries(tmp_path, "plan")) == len(entries(tmp_path, "importance")) == 2
    assert len(entries(tmp_path, "outcomes")) == 1
    calls, real = [], ModelOracle.outcome
    monkeypatch.setattr(ModelOracle, "outcome", lambda *given: calls.append(given) or real(*given))
    more = "search.optimiser={trials: 8, initial: 3, pool: 16, near: 8, steps: 5, smaller: 0}"
    found = session(job, "qpruner-3", more, cache=tmp_path).found()
    assert len(found.tried) == 8
    assert len(calls) <= 2  # more trials go on from those there are


def test_a_plan_that_the_recipe_cannot_apply_is_refused(job, tmp_path):
    paired = session(job, "qpruner-1", cache=tmp_path / "cache").find_plan(None)
    plain = session(job, "loftq-only", "lowrank=null", "tune=null", cache=tmp_path / "cache")
    with pytest.raises(PlanError, match="has no `lowrank`"):
        plain.write(paired, tmp_path / "a")
    with pytest.raises(PlanError, match="but the plan has none"):
        session(job, "loftq-only", cache=tmp_path / "cache").write(plain.find_plan(None), tmp_path / "b")
    refitted = open_session(job.model, load_recipe(str(job.recipe)), calibration=str(job.text)).find_plan(
        Budget.parse("30kB")
    )
    assert refitted.biases
    with pytest.raises(PlanError, match="fits nothing"):
        plain.write(refitted, tmp_path / "c")


def test_training_keeps_no_dense_weight(compressed):
    """What autograd saves of a packed layer is not the matrix."""
    _, _, out = compressed
    model = AutoModelForCausalLM.from_pretrained(out)
    sizes = []
    layer = next((m for m in model.modules() if isinstance(m, PackedLinear)), None)
    assert (layer is None) == ("llm-pruner" in str(out))
    if layer is None:
        return
    x = torch.randn(1, 3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    y.float().sum().backward()
    assert layer.in_features * layer.out_features not in sizes
    want = layer.dense(torch.float32).sum(0) + (layer.adapter.b.float() @ layer.adapter.a.float()).sum(0)
    torch.testing.assert_close(x.grad[0, 0].float(), want, rtol=2e-2, atol=2e-2)
