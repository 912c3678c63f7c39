"""What a search by trials goes by: KL, NLL or accuracy, before or after recovery; and which weights share a format."""

import json
import random

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from objectives import QUICK, outcomes, session
from qpruner_jobs import CHOOSING, PRUNED, SMALL
from sessions import compress, entries, open_session
from tiny import VOCAB
from trimbit.errors import DataError, RecipeError
from trimbit.evaluate.tasks import SOURCES
from trimbit.pipeline.recipes import load_recipe
from trimbit.search.variables import variables


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with twenty questions."""
    pytest.importorskip("lm_eval")
    rng, folder = random.Random(0), tmp_path_factory.mktemp("tasks")

    def words(count):
        return " ".join(f"w{rng.randrange(3, VOCAB)}" for _ in range(count))

    rows = [{"goal": words(5), "sol1": words(2), "sol2": words(4), "label": at % 2} for at in range(20)]
    (folder / f"{SOURCES['piqa'].stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("steps", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("by", ["kl", "nll", "accuracy"])
def test_the_best_by_the_objective_is_taken(job, tasks, tmp_path, by, steps):
    asked = (f"search.objective.by={by}", f"search.objective.steps={steps}")
    if by == "accuracy":
        asked += ("search.objective.tasks=[piqa]", f"search.objective.data={tasks}", "search.objective.documents=16")
    opened = session(job, tmp_path, *asked)
    result = opened.found()
    plan, found = result.plan, outcomes(result)
    assert len(found) == 6 + 2
    if by == "accuracy":
        assert all(one.accuracy * 16 == int(one.accuracy * 16) for one in found)
        want = max(found, key=lambda one: one.accuracy)
    else:
        assert all(one.accuracy is None for one in found)
        want = min(found, key=lambda one: getattr(one, by))
    assert plan.content == next(one.plan.content for one in result.tried if one.outcome == want)
    again = opened.oracle.outcome(plan, opened.objective)
    assert again.kl == pytest.approx(want.kl, rel=1e-3)
    assert again.nll == pytest.approx(want.nll, rel=1e-3)


@pytest.mark.slow
def test_the_faithful_form_runs_whole(job, tasks, tmp_path):
    """Histogram, accuracy, instructions; the blocks that are not pruned stay as they are."""
    rows = [{"instruction": "w5 w6", "output": f"w{at + 8} w9"} for at in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (f"search.objective.data={tasks}", "search.objective.tasks=[piqa]", f"tune.data={tmp_path / 'rows.jsonl'}")
    own = (*SMALL, *PRUNED, *CHOOSING, QUICK, *given, "tune.length=64", "tune.batch=5")
    own += ("search.per=weight", "search.share=0.5")
    recipe = load_recipe("qpruner-3-faithful", own)
    opened = open_session(job.model, recipe, calibration=str(job.text), cache=tmp_path / "cache")
    plan = compress(opened, None, tmp_path / "out")
    names = {index: plan.weights[f"model.layers.{index}.mlp.up_proj"][0].precision.name for index in range(3)}
    spared = [index for index in range(3) if index in opened.space.spared]
    assert spared
    assert all((name == "bf16") == (index in spared) for index, name in names.items())
    found = outcomes(opened.found())
    assert len(found) == 6 + 2
    assert all(one.correct.count("1") / 20 == one.accuracy for one in found)


@pytest.mark.slow
def test_recovery_is_part_of_an_outcome(job, tmp_path):
    """Trained plans are nearer to the original than the same plans as they start."""
    slow = ("tune.learning_rate=0.002",)
    before, after = (session(job, tmp_path / str(n), f"search.objective.steps={n}", *slow) for n in (0, 30))
    plan = before.find_plan(None)
    kls = [opened.oracle.outcome(plan, opened.objective).kl for opened in (before, after)]
    assert kls[1] < kls[0]
    other = session(job, tmp_path / "4", "search.objective.steps=30", "tune.learning_rate=0.004")
    longer = session(job, tmp_path / "5", "search.objective.steps=30", *slow, "tune.steps=9", "tune.save_every=3")
    folders = [one.oracle._outcomes_folder(one.objective).name for one in (after, other, longer)]
    assert folders[0] != folders[1]
    assert folders[0] == folders[2]
    assert entries(tmp_path / "30", "pairs") == []  # nothing is left of a trial but its outcome
    assert entries(tmp_path / "30", "applied") == []


def test_the_nll_of_the_dense_model(job, tmp_path):
    opened = session(job, tmp_path)
    probe = opened.oracle._choose_probe
    model, tokens = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32), probe.tokens
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    want = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert probe.divergence().nll == pytest.approx(float(want), rel=1e-3)
    assert probe.divergence().kl == pytest.approx(0, abs=1e-5)


def test_weights_may_each_have_a_format(job, tmp_path):
    """Weights that read the same input too; what is put together is what is written."""
    opened = session(job, tmp_path, "search.per=weight")
    problem = opened.problem()
    found = variables(problem, "weight")
    point = [at % 4 for at in range(len(found.costs))]
    plan = found.plan(point, "by hand")
    q, k = (plan.weights[f"model.layers.1.self_attn.{name}_proj"][0].precision for name in "qk")
    assert q != k
    assert opened.oracle.estimate_kl(plan) == pytest.approx(opened.oracle.apply_and_measure(plan).choose, rel=0.05)
    weights = sum(costs[level] for costs, level in zip(found.costs, point, strict=True))
    assert plan.found_by.nbytes <= problem.budget_nbytes - found.room_nbytes + weights


def test_a_weight_has_the_importance_of_its_sub_block(job, tmp_path):
    opened = session(job, tmp_path, "search.per=weight")
    found = variables(opened.problem(), "weight")
    named = dict(zip(found.covers, found.layers, strict=True))
    assert named["model.layers.2.self_attn.k_proj"] == "blocks.2.attn"
    assert named["model.layers.1.mlp.up_proj"] == "blocks.1.mlp"


def test_an_objective_after_training_needs_training(job, tmp_path):
    with pytest.raises(RecipeError, match="needs a `tune`"):
        session(job, tmp_path, "search.objective.steps=2", "tune=null")


@pytest.mark.parametrize(
    "override", ["space.widths=[1.0,0.5]", "space.prune_kv_groups=true", "space.embedding_formats=[bf16,int8row]"]
)
@pytest.mark.parametrize("search", ["bayes", "importance"])
def test_choices_that_the_search_does_not_make_are_refused(job, tmp_path, override, search):
    only = () if search == "bayes" else ("search={name: importance, params: {}}",)
    with pytest.raises(RecipeError, match="chooses bits of the blocks alone"):
        session(job, tmp_path, override, *only).find_plan(None)
    assert entries(tmp_path, "*") == []


@pytest.mark.slow
def test_recovery_of_a_model_in_fp32(job, tmp_path):
    """The original's answers then are in fp32, too."""
    plan = compress(session(job, tmp_path / "c", "compute=float32"), None, tmp_path / "out")
    assert 0 < plan.found_by.measured_damage < 5


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("search.objective.by=accuracy", RecipeError, "needs tasks"),
        ("search.objective.workers=3", RecipeError, "3 workers share a batch of 2"),
        ("search.objective.by=speed", RecipeError, "objective.by"),
        ("search.objective={by: accuracy, tasks: [chess]}", DataError, "no task 'chess'"),
        ("search.objective={by: accuracy, tasks: [piqa], data: nowhere}", DataError, "nowhere"),
        ("search.objective={by: accuracy, tasks: [piqa]}", DataError, "give a folder .*search.objective.data"),
    ],
)
def test_bad_objectives_are_refused_first(job, tmp_path, override, error, says):
    with pytest.raises(error, match=says):
        session(job, tmp_path, override).find_plan(None)
    assert entries(tmp_path, "*") == []
