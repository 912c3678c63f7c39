"""What a search by trials goes by: KL, NLL or accuracy, before or after recovery; and which weights share a format."""

import csv
import io
import json
import random
import re

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from plans import FOUND, REF
from test_qpruner import CHOOSING, PRUNED, SMALL
from tiny import VOCAB
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import ArtifactError, BudgetError, DataError, NumericsError, RecipeError
from trimbit.evaluate.tasks import SOURCES
from trimbit.pipeline.recipes import load_recipe, read_recipe
from trimbit.pipeline.session import compress, open_session
from trimbit.report.pareto import Trial, picture, table
from trimbit.schema.budget import Budget
from trimbit.schema.objective import Outcome
from trimbit.schema.plan import Plan, load_plan
from trimbit.search.variables import variables

QUICK = "search.optimiser={trials: 6, initial: 3, pool: 16, near: 8, steps: 5, batch: 2, smaller: 2}"
FOUR = "space.formats=[uint2g32, uint3g32, uint4g32, int8row]"


def session(job, cache, *overrides):
    recipe = load_recipe("qpruner-3", SMALL + PRUNED + CHOOSING + (QUICK, FOUR, "search.per=unit") + overrides)
    return open_session(job.model, recipe, calibration=str(job.text), cache=cache)


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


def trials(cache):
    (journal,) = (cache / "plans").glob("*.jsonl")
    entries = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    entries.sort(key=lambda entry: ("after" in entry, entry["number"]))
    return [Outcome.model_validate(entry["outcome"]) for entry in entries]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("by", ["kl", "nll", "accuracy"])
def test_the_best_by_the_objective_is_taken(job, tasks, tmp_path, by, steps):
    asked = (f"search.objective.by={by}", f"search.objective.steps={steps}")
    if by == "accuracy":
        asked += ("search.objective.tasks=[piqa]", f"search.objective.data={tasks}", "search.objective.documents=16")
    opened = session(job, tmp_path, *asked)
    plan = opened.find_plan(None)
    found = trials(tmp_path)
    assert len(found) == 6 + 2
    if by == "accuracy":
        assert all(one.accuracy * 16 == int(one.accuracy * 16) for one in found)
        want = max(found, key=lambda one: one.accuracy)
    else:
        assert all(one.accuracy is None for one in found)
        want = min(found, key=lambda one: getattr(one, by))
    assert f"{want.kl:.4f} nats" in plan.found_by.notes[0].split("the best")[1]
    again = opened.judging.outcome(plan)
    assert again.kl == pytest.approx(want.kl, rel=1e-3)
    assert again.nll == pytest.approx(want.nll, rel=1e-3)


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
    assert "%" in plan.found_by.notes[0]
    names = {index: plan.weights[f"model.layers.{index}.mlp.up_proj"][0].precision.name for index in range(3)}
    spared = [index for index in range(3) if index in opened.space.spared]
    assert spared
    assert all((name == "bf16") == (index in spared) for index, name in names.items())
    found = trials(tmp_path / "cache")
    assert len(found) == 6 + 2
    assert all(one.correct.count("1") / 20 == one.accuracy for one in found)


def test_recovery_is_part_of_an_outcome(job, tmp_path):
    """Trained plans are nearer to the original than the same plans as they start."""
    slow = ("tune.learning_rate=0.002",)
    before, after = (session(job, tmp_path / str(n), f"search.objective.steps={n}", *slow) for n in (0, 30))
    plan = before.find_plan(None)
    assert after.judging.outcome(plan).kl < before.judging.outcome(plan).kl
    other = session(job, tmp_path / "4", "search.objective.steps=30", "tune.learning_rate=0.004")
    longer = session(job, tmp_path / "5", "search.objective.steps=30", *slow, "tune.steps=9", "tune.save_every=3")
    assert after._search_key(10**6) != other._search_key(10**6)
    assert after._search_key(10**6) == longer._search_key(10**6)
    assert not list((tmp_path / "30").glob("tuned/*"))  # nothing is left of a trial but its outcome
    assert not list((tmp_path / "30").glob("trials/*"))


def test_the_nll_of_the_dense_model(job, tmp_path):
    opened = session(job, tmp_path)
    probe = opened.judging.judges[1]
    model, tokens = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32), probe.tokens
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    want = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert probe.judged().nll == pytest.approx(float(want), rel=1e-3)
    assert probe.judged().kl == pytest.approx(0, abs=1e-5)


@pytest.fixture
def threads():
    """The number of threads is as it was, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("calibration", ["file", "self"])
def test_processes_find_the_same(job, tmp_path, monkeypatch, calibration):
    """Two processes, each with a model of its own, judge the plans of a batch; they sample no text of their own."""
    if calibration == "self":
        monkeypatch.setattr(job, "text", "self")
        torch.set_num_threads(2)  # a process has one, and must not take that for what the text was sampled with
    one = session(job, tmp_path / "one")
    two = session(job, tmp_path / "two", "search.objective.workers=2")
    assert one._search_key(10**6) == two._search_key(10**6)
    monkeypatch.setattr(two.judging, "outcome", None)  # nothing is judged in this process
    plans = [opened.find_plan(None) for opened in (one, two)]
    assert plans[0].weights == plans[1].weights
    for alone, shared in zip(trials(tmp_path / "one"), trials(tmp_path / "two"), strict=True):
        assert alone.kl == pytest.approx(shared.kl, rel=1e-4)
    assert two.judging.workers is None
    assert len(list((tmp_path / "two").glob("tokens/*"))) == (calibration == "self")
    assert len(list((tmp_path / "two").glob("candidates/*"))) == 1


def test_a_journal_whose_order_is_another_goes_on(job, tmp_path, monkeypatch):
    """Processes end in any order: here the first plan of a batch was still at work when the search was killed."""
    opened = session(job, tmp_path)
    plan = opened.find_plan(None)
    (journal,) = (tmp_path / "plans").glob("*.jsonl")
    header, *lines = journal.read_text().splitlines(keepends=True)
    assert [json.loads(line)["number"] for line in lines] == [0, 1, 2, 3, 4, 5, 0, 1]
    journal.write_text("".join([header, lines[2], lines[1]]))
    again = session(job, tmp_path)
    asked = []
    real = again.judging.outcome
    monkeypatch.setattr(again.judging, "outcome", lambda plan: asked.append(plan) or real(plan))
    assert again.find_plan(None) == plan
    assert len(asked) == 6
    trials = [[trial.outcome for trial in by.tried[plan.content][1]] for by in (opened, again)]
    assert trials[0] == trials[1]


def test_what_a_process_cannot_do_is_said(job, tmp_path, monkeypatch):
    opened = session(
        job, tmp_path, "search.objective.workers=2", "search.objective.steps=2", "tune.learning_rate=1.0e+30"
    )
    monkeypatch.setattr(opened.judging, "outcome", None)  # nothing is judged in this process
    with pytest.raises(NumericsError, match="a loss of step 2 of recovery is not finite"):
        opened.find_plan(None)
    assert opened.judging.workers is None


def test_weights_may_each_have_a_format(job, tmp_path):
    """Weights that read the same input too; what is put together is what is written."""
    opened = session(job, tmp_path, "search.per=weight")
    problem = opened.problem(opened.limit(None))
    found = variables(problem, "weight")
    point = [at % 4 for at in range(len(found.costs))]
    plan = found.plan(point, "by hand")
    q, k = (plan.weights[f"model.layers.1.self_attn.{name}_proj"][0].precision for name in "qk")
    assert q != k
    assert opened.judging.evaluate(plan) == pytest.approx(opened.judging.trial(plan), rel=0.05)
    weights = sum(costs[level] for costs, level in zip(found.costs, point, strict=True))
    assert plan.found_by.nbytes <= problem.limit - found.limit + weights


def test_a_weight_has_the_importance_of_its_sub_block(job, tmp_path):
    opened = session(job, tmp_path, "search.per=weight")
    found = variables(opened.problem(opened.limit(None)), "weight")
    named = dict(zip(found.covers, found.layers, strict=True))
    assert named["model.layers.2.self_attn.k_proj"] == "blocks.2.attn"
    assert named["model.layers.1.mlp.up_proj"] == "blocks.1.mlp"


def test_an_objective_after_training_needs_training(job, tmp_path):
    with pytest.raises(RecipeError, match="needs a `tune`"):
        session(job, tmp_path, "search.objective.steps=2", "tune=null")


def test_trials_lie_beside_the_plan_that_came_of_them(job, tmp_path):
    """Of two budgets, each has its own; fewer trials are not told as more; a plan without trials has none."""
    opened = session(job, tmp_path / "c")
    limit = opened.limit(None)
    wide, narrow = opened.find_plan(None), opened.find_plan(Budget.parse(f"{limit - 600}B"))
    fewer = session(job, tmp_path / "c", QUICK.replace("trials: 6", "trials: 4"))
    few = fewer.find_plan(None)
    with pytest.raises(BudgetError) as refused:
        opened.limit(Budget.parse("1kB"))
    smallest = re.search(r"--budget (\d+B)", str(refused.value))[1]
    for name, (by, plan, count) in {
        "wide": (opened, wide, 6 + 2), "narrow": (opened, narrow, 6 + 2), "few": (fewer, few, 4 + 2),
        "smallest": (opened, opened.find_plan(Budget.parse(smallest)), 0),
    }.items():  # fmt: skip
        by.write(plan, tmp_path / name)
        table = tmp_path / name / "trials.csv"
        rows = list(csv.DictReader(table.read_text().splitlines())) if count else []
        assert table.exists() == bool(count)
        assert len(rows) == count
        if count:
            assert plan.found_by.nbytes in {int(row["nbytes"]) for row in rows}
            sizes = sorted(int(row["nbytes"]) for row in rows)
            assert sizes[0] + 1_000 < sizes[1] < sizes[2] - 1_000  # the smallest plan, and one half-way to the others
        if name == "narrow":
            assert all(int(row["nbytes"]) <= limit - 600 for row in rows)


def test_the_pareto_set_can_be_applied(job, tmp_path, monkeypatch):
    monkeypatch.setattr("trimbit.search.solvers.pareto.PAGE", 0)  # all plans of this model are less than that apart
    opened = session(job, tmp_path / "c")
    compress(opened, None, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "trials.csv").read_text().splitlines()))
    unbeaten = {f"trial-{row['trial']}.json": row for row in rows if row["pareto"] == "1"}
    found = {path.name: load_plan(path) for path in (tmp_path / "out" / "pareto").iterdir()}
    assert found.keys() == unbeaten.keys()
    assert len(found) > 1
    for name, row in unbeaten.items():
        assert found[name].found_by.nbytes == int(row["nbytes"])
        assert found[name].found_by.notes == (f"{float(row['kl']):.4f} nats",)
    smallest = min(found.values(), key=lambda plan: plan.found_by.nbytes)
    recipe = read_recipe(smallest.found_by.recipe, "its own")
    by = open_session(job.model, recipe, calibration=str(job.text), cache=tmp_path / "c", seed=smallest.found_by.seed)
    by.write(smallest, tmp_path / "small")
    assert weight_nbytes(tmp_path / "small") == smallest.found_by.nbytes < weight_nbytes(tmp_path / "out") - 1_000


@pytest.mark.parametrize(
    "override", ["space.widths=[1.0,0.5]", "space.prune_kv_groups=true", "space.embedding_formats=[bf16,int8row]"]
)
@pytest.mark.parametrize("search", ["bayes", "importance"])
def test_choices_that_the_search_does_not_make_are_refused(job, tmp_path, override, search):
    only = () if search == "bayes" else ("search={name: importance, params: {}}",)
    with pytest.raises(RecipeError, match="chooses bits of the blocks alone"):
        session(job, tmp_path, override, *only).find_plan(None)
    assert not any(tmp_path.iterdir())


def test_a_damaged_journal_is_named(job, tmp_path):
    session(job, tmp_path).find_plan(None)
    (journal,) = (tmp_path / "plans").glob("*.jsonl")
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:]]) + "\n")
    with pytest.raises(ArtifactError, match=f"{journal}: .* damaged; remove it"):
        session(job, tmp_path).find_plan(None)


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
    assert not any(tmp_path.iterdir())


def plan_nbytes(nbytes):
    return Plan(model=REF, weights={}, found_by=FOUND.model_copy(update={"nbytes": nbytes}))


def test_a_table_and_a_picture_with_accuracy():
    tried = [
        Trial(plan_nbytes(nbytes), Outcome(kl=kl, nll=3.0, accuracy=accuracy, stderr=0.02))
        for nbytes, kl, accuracy in [(10_000, 0.5, 0.4), (20_000, 0.3, 0.6), (30_000, 0.4, 0.5), (20_008, 0.31, 0.5)]
    ]
    rows = list(csv.DictReader(io.StringIO(table(tried))))
    assert [row["pareto"] for row in rows] == ["1", "1", "0", "0"]
    assert float(rows[1]["accuracy"]) == 0.6
    with_accuracy = picture(tried, 31_000)
    without = picture([Trial(t.plan, Outcome(kl=t.outcome.kl, nll=3.0)) for t in tried], 31_000)
    assert width(with_accuracy) == 2 * width(without)


def width(png):
    return int.from_bytes(png[16:20], "big")
