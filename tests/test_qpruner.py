"""QPruner's recipes whole, on a tiny llama: pruned, bits allocated, low-rank pairs trained in the quantised state."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tiny import VOCAB, tiny_model
from trimbit.artifact.files import weight_nbytes
from trimbit.calibrate import teacher
from trimbit.calibrate.teacher import teacher_outputs
from trimbit.errors import BudgetError, DataError, NumericsError, PlanError, RecipeError
from trimbit.model.forward.logits import logit_slices, loss_gradient
from trimbit.pipeline.dry_run import estimate
from trimbit.pipeline.recipes import load_recipe
from trimbit.pipeline.session import compress, open_session
from trimbit.recover import recovery
from trimbit.recover.recovery import _taken_out
from trimbit.recover.tune import Config, _drawn, drawn, tune
from trimbit.runtime.layers import AdaptedLinear, PackedLinear
from trimbit.runtime.load import load_model
from trimbit.schema.budget import Budget
from trimbit.schema.plan import load_plan

TOKENS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
SMALL = (
    "calibration.rows=6", "calibration.length=64", "calibration.held_out=2", "measure.rows=2", "measure.length=32",
    "lowrank.rank=2", "tune.steps=4", "tune.batch=12", "tune.micro=5", "tune.length=32", "tune.save_every=2",
    "tune.learning_rate=0.01", "tune.dropout=0",
)  # fmt: skip
PRUNED = ("criterion.samples=4", "criterion.length=32", "prune.first=0.3", "prune.last=0", "prune.channel_multiple=16")
CHOOSING = ("importance.classes=8", "space.formats=[nf4g64, int8row]")
TRIALS = (
    "search.optimiser={trials: 6, initial: 3, pool: 16, near: 8, steps: 5, smaller: 2}", "search.per=unit",
    "space.formats=[uint2g32, uint3g32, uint4g32, int8row]",
)  # fmt: skip
RECIPES = {
    "loftq-only": SMALL,
    "llm-pruner": SMALL + PRUNED,
    "qpruner-1": SMALL + PRUNED,
    "qpruner-2": SMALL + PRUNED + CHOOSING,
    "qpruner-3": SMALL + PRUNED + CHOOSING + TRIALS,
}


def session(job, name, *overrides, **fields):
    return open_session(job.model, load_recipe(name, RECIPES[name] + overrides), calibration=str(job.text), **fields)


@pytest.fixture(scope="module", params=RECIPES)
def compressed(request, job, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    opened = session(job, request.param, cache=folder / "cache")
    return opened, compress(opened, None, folder / "out"), folder / "out"


def test_as_large_as_the_plan_says_pairs_included(compressed):
    opened, plan, out = compressed
    assert weight_nbytes(out) == plan.found_by.nbytes == opened.layout.file_nbytes(plan)
    assert plan == load_plan(out / "plan.json")
    weights = {name for name in plan.weights if name.startswith("model.layers.")}
    assert set(plan.adapters) == weights
    stored = load_file(out / "model.safetensors")
    for name in weights:
        assert stored[f"{name}.adapter.a"].shape[0] == stored[f"{name}.adapter.b"].shape[1] == 2
    assert plan.found_by.nbytes <= opened.limit(None)


def test_loads_and_its_loss_fell(compressed):
    opened, plan, out = compressed
    model = AutoModelForCausalLM.from_pretrained(out)
    logits = model(torch.randint(3, VOCAB, (1, 9))).logits
    assert bool(logits.isfinite().all())
    record = json.loads((out / "tuning.json").read_text())
    assert len(record["losses"]) == 4
    assert record["losses"][-1] < record["losses"][0]
    assert record["optimizer_nbytes"] == 2 * record["trained_nbytes"]
    specs = opened.layout.tensors(plan)
    pairs = sum(spec.nbytes // 2 for name, spec in specs.items() if ".adapter." in name)
    assert record["trained_nbytes"] == 4 * pairs
    assert f"4 steps, loss {record['losses'][0]:.4f} to {record['losses'][-1]:.4f}" in plan.found_by.notes[-1]


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
    ranked = sorted(("1", "2"), key=lambda block: opened.importance[f"blocks.{block}"])
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
    limit = opened.limit(None)
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


def test_a_search_that_was_broken_off_goes_on(job, tmp_path, monkeypatch):
    """Killed at every trial, it tries nothing twice and ends with the same plan."""
    whole = session(job, "qpruner-3", cache=tmp_path / "one").find_plan(None)
    calls = []
    for _ in range(9):
        opened = session(job, "qpruner-3", cache=tmp_path / "two")
        real = opened.judging.outcome
        killed = []

        def once(plan, real=real, killed=killed):
            if killed:
                raise KeyboardInterrupt
            killed.append(1)
            calls.append(plan.weights)
            return real(plan)

        monkeypatch.setattr(opened.judging, "outcome", once)
        try:
            plan = opened.find_plan(None)
            break
        except KeyboardInterrupt:
            continue
    assert plan.weights == whole.weights
    assert plan.found_by.notes == whole.found_by.notes
    assert len(calls) == 6 + 2
    assert f"{len(calls)} plans tried" in whole.found_by.notes[0]
    assert all(a != b for at, a in enumerate(calls) for b in calls[:at])


def test_another_searchs_journal_is_refused(job, tmp_path):
    opened = session(job, "qpruner-3", cache=tmp_path)
    opened.find_plan(None)
    (journal,) = (tmp_path / "plans").glob("*.jsonl")
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0].replace('": "', '": "x'), *lines[1:]]) + "\n")
    with pytest.raises(PlanError, match="results of another"):
        session(job, "qpruner-3", cache=tmp_path).find_plan(None)


def test_every_row_is_seen_once_an_epoch():
    seen = [at for step in range(12) for at in _drawn(step, 5, 12, seed=3)]
    epochs = [seen[at : at + 12] for at in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_recovery_that_was_broken_off_goes_on(job, tmp_path, monkeypatch):
    """With dropout, in the middle of an epoch."""
    noisy = ("tune.dropout=0.3", "tune.batch=5")
    compress(session(job, "qpruner-1", *noisy, cache=tmp_path / "one"), None, tmp_path / "whole")
    from trimbit.recover import tune

    real, steps = tune._step, []

    def breaking(*arguments):
        if len(steps) == 3:
            steps.append("killed")
            raise KeyboardInterrupt
        steps.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(tune, "_step", breaking)
    with pytest.raises(KeyboardInterrupt):
        compress(session(job, "qpruner-1", *noisy, cache=tmp_path / "two"), None, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    compress(session(job, "qpruner-1", *noisy, cache=tmp_path / "two"), None, tmp_path / "resumed")
    assert steps == [0, 1, 2, "killed", 2, 3]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert files[0] == files[1]


def test_checkpointing_changes_memory_alone(job, tmp_path):
    """The same losses, from fewer tensors kept between forward and backward."""
    losses, kept = [], []
    for name, overrides in {"plain": (), "again": ("tune.checkpointing=true",)}.items():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            compress(session(job, "qpruner-1", *overrides, cache=tmp_path / f"{name} cache"), None, tmp_path / name)
        losses.append(json.loads((tmp_path / name / "tuning.json").read_text())["losses"])
        kept.append(sum(sizes))
    assert losses[0] == losses[1]
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("step", [1, 2, 3])  # of four; after the second and the last one the state is stored
def test_what_is_not_finite_stops_with_the_last_good_state(job, tmp_path, monkeypatch, what, step):
    from trimbit.recover import tune

    real = tune._step

    def broken(model, *rest):
        """At one step the loss, or one element of a gradient, is not finite; the other one is."""
        loss = real(model, *rest)
        if rest[-1] == step and what == "gradient":
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = float("nan")
        return float("nan") if rest[-1] == step and what == "loss" else loss

    monkeypatch.setattr(tune, "_step", broken)
    kept = "no state was kept yet" if step < 2 else "the state after step 2 is kept"
    with pytest.raises(NumericsError, match=f"a {what} of step {step + 1} of recovery is not finite; {kept}"):
        compress(session(job, "qpruner-1", cache=tmp_path), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    states = list((tmp_path / "tuned").glob("*.safetensors"))
    assert len(states) == (step >= 2)
    assert all(bool(tensor.isfinite().all()) for state in states for tensor in load_file(state).values())


def test_a_recovery_that_breaks_the_model_at_its_last_step_writes_nothing(job, tmp_path):
    broken = ("tune.learning_rate=1e30", "tune.steps=1", "tune.warmup=0.0")
    with pytest.raises(NumericsError, match="not finite"):
        compress(session(job, "qpruner-1", *broken, cache=tmp_path), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recovery_trains_on_rows_of_its_own(job, tmp_path):
    one, other = (session(job, "qpruner-1", f"calibration.training={n}", cache=tmp_path) for n in (0, 3))
    rows = [torch.cat([row.tokens for row in opened.examples]) for opened in (one, other)]
    assert torch.equal(rows[0], one.tokens.tokens.flatten())
    assert torch.equal(rows[1], other.training.tokens.flatten())
    assert len(rows[1]) == 3 * len(rows[0]) // 6


def test_instructions_mask_the_prompt(job, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"instruction": "w5 w6", "input": "w7" * (at % 2), "output": f"w{at + 8} w9"} for at in range(5)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    opened = session(
        job,
        "qpruner-1",
        "tune.loss=instruct",
        f"tune.data={data}",
        "tune.length=64",
        "tune.batch=5",
        cache=tmp_path / "c",
    )
    for row in opened.examples:
        assert int(row.loss_mask.sum()) == 3  # the output and its end
        assert bool(row.loss_mask[-3:].all())
    compress(opened, None, tmp_path / "out")
    losses = json.loads((tmp_path / "out" / "tuning.json").read_text())["losses"]
    assert losses[-1] < losses[0]


def test_the_originals_answers_are_kept_and_are_those_of_the_whole_model(job, tmp_path, monkeypatch):
    """In groups of rows, what is missing alone; on all tokens of an instruction."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"instruction": "w5", "output": f"w{at + 8} " * (at + 1)}) for at in range(5)))
    opened = session(job, "qpruner-1", f"tune.data={data}", "tune.length=64", cache=tmp_path / "c")
    assert all(bool(row.loss_mask[1:].all()) and not bool(row.loss_mask[0]) for row in opened.examples)
    examples = [row.tokens for row in opened.examples]
    monkeypatch.setattr(teacher, "CARRIED", 4 * 48 * 100)
    swept = []
    first = teacher_outputs(opened.stream, examples[:2], tmp_path / "kept", lambda *done: swept.append(done))
    count = len(swept)
    original = teacher_outputs(opened.stream, examples, tmp_path / "kept", lambda *done: swept.append(done))
    assert 0 < count < len(swept)
    again = teacher_outputs(opened.stream, examples, tmp_path / "kept", lambda *_: pytest.fail("all are there"))
    whole = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    for row in examples:
        found = original.hidden(row)
        assert torch.equal(found, again.hidden(row))
        want = whole.get_decoder()(row[None]).last_hidden_state[0]
        torch.testing.assert_close(found.float(), want, rtol=0.05, atol=0.05)
    assert torch.equal(first.hidden(examples[1]), original.hidden(examples[1]))
    torch.testing.assert_close(original.head(found).float(), whole.lm_head(want), rtol=0.05, atol=0.1)


def test_what_training_draws_is_known_before():
    config = Config(steps=3, batch=4)
    assert drawn(config, 100, 0) == sorted(at for step in range(3) for at in _drawn(step, 4, 100, 0))
    assert drawn(config, 5, 0) == [0, 1, 2, 3, 4]


def test_training_asks_the_original_for_what_was_drawn_and_no_more(job, tmp_path, monkeypatch):
    opened = session(job, "qpruner-1", "tune.batch=3", "tune.steps=2", cache=tmp_path)
    asked, found = set(), recovery.teacher_outputs

    def listening(*arguments):
        original = found(*arguments)
        listen = lambda tokens: asked.add(tuple(tokens.tolist())) or original.hidden(tokens)  # noqa: E731
        return replace(original, hidden=listen)

    monkeypatch.setattr(recovery, "original_of", listening)
    opened.recovery.train(opened.trials.applied(opened.find_plan(None)))
    rows = drawn(opened.tuning, len(opened.examples), 0)
    assert asked == {tuple(opened.examples[at].tokens.tolist()) for at in rows}
    assert len(asked) == 6 < len(opened.examples)


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
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["qpruner-2", "qpruner-3"])
def test_a_budget_below_all_lowest_names_the_smallest_and_that_one_fits(job, tmp_path, name):
    with pytest.raises(BudgetError, match="smallest feasible budget") as err:
        session(job, name, cache=tmp_path).find_plan(Budget.parse("20kB"))
    smallest = str(err.value).split("--budget ")[1].rstrip(")")
    found = session(job, name, cache=tmp_path).find_plan(Budget.parse(smallest))
    assert found.found_by.nbytes == int(smallest.removesuffix("B"))


def test_another_estimator_is_another_search(job, tmp_path):
    session(job, "qpruner-3", cache=tmp_path).find_plan(None)
    session(job, "qpruner-3", "importance.estimator=histogram", cache=tmp_path).find_plan(None)
    assert len(list((tmp_path / "plans").glob("*.jsonl"))) == 2
    more = "search.optimiser={trials: 6, initial: 3, pool: 16, near: 8, steps: 5}"
    session(job, "qpruner-3", more, cache=tmp_path).find_plan(None)
    assert len(list((tmp_path / "plans").glob("*.jsonl"))) == 2  # more trials go on from those there are


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


def test_the_written_pairs_are_those_that_were_trained(job, tmp_path):
    """PEFT's model, with its scale of alpha / rank = 8, and the directory give the same logits."""
    opened = session(job, "qpruner-1", cache=tmp_path)
    plan = opened.find_plan(None)
    opened.judging.trial(plan)
    folder = opened.trials.place(plan)
    model = load_model(folder, torch.bfloat16)
    kinds, before = (PackedLinear, AdaptedLinear), model(TOKENS).logits
    pairs = _taken_out(model)
    tuned = tune(
        model, pairs, kinds, opened.examples, None, opened.tuning, tmp_path / "s.safetensors", 0, lambda *_: None
    )
    again = load_model(folder, torch.bfloat16)
    with torch.no_grad():
        for name, module in again.named_modules():
            if name in tuned.pairs:
                module.adapter.a.copy_(tuned.pairs[name].a)
                module.adapter.b.copy_(tuned.pairs[name].b)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        trained, written = model(TOKENS).logits, again(TOKENS).logits
    assert (trained - before).abs().max() > 0.5
    torch.testing.assert_close(trained.float(), written.float(), rtol=0.05, atol=0.1)


def test_defaults_are_those_of_the_reference():
    assert Config().learning_rate == 1e-4
    assert Config().length == 256


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("distil", [False, True])
def test_the_loss_and_its_gradient_are_those_of_whole_logits(cap, distil, monkeypatch):
    """Some tokens at a time, with a soft cap and without, against plain torch on all logits at once."""
    monkeypatch.setattr("trimbit.model.forward.logits.LOGIT_TOKENS", 3)
    model = tiny_model("llama")
    model.config.final_logit_softcapping = cap
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(8, 48, generator=generator) for _ in range(2))
    labels = torch.randint(3, VOCAB, (8,), generator=generator)
    head = torch.nn.Linear(48, VOCAB, bias=False).requires_grad_(requires_grad=False)
    slices = logit_slices(head, model.config, taught) if distil else None
    sliced, whole = (hidden.clone().requires_grad_() for _ in range(2))
    found = loss_gradient(model.get_output_embeddings(), model.config, sliced * 1, labels, slices, 8)

    def log_probabilities(logits):
        return torch.log_softmax(cap * torch.tanh(logits / cap) if cap else logits, -1)

    log_q = log_probabilities(model.get_output_embeddings()(whole))
    log_p = log_probabilities(head(taught))
    want = (log_p.exp() * (log_p - log_q)).sum() / 8 if distil else -log_q[range(8), labels].mean()
    want.backward()
    assert found == pytest.approx(float(want.detach()), rel=1e-5)
    torch.testing.assert_close(sliced.grad, whole.grad, rtol=1e-4, atol=1e-6)


def test_a_dry_run_counts_recovery_and_needs_no_budget(job, tmp_path):
    def minutes(steps):
        rows = dict(estimate(session(job, "qpruner-1", f"tune.steps={steps}", cache=tmp_path), None))
        return int(rows["time"].split()[1])

    assert minutes(10**9) > minutes(1) + 60
    assert not any(tmp_path.iterdir())
