"""Applying a plan: what rounding loses, GPTQ and the refit win back; errors name the weight."""

from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from plans import make_plan, runs
from tiny import MODEL_TYPES, VOCAB, save_tiny, tiny_model
from trimbit.artifact.writer import Writer
from trimbit.calibrate.stats import Stats
from trimbit.errors import NumericsError, PlanError
from trimbit.jobs import carried
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream
from trimbit.schema.plan import load_plan
from trimbit.transform.apply import apply_plan
from trimbit.transform.block import _Job
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.repair import refit
from trimbit.transform.weight import WeightCompressor
from written import collected, taught, writing

RTN, GPTQ = (
    WeightCompressor(module=rtn, config=rtn.Config(scales="mse")),
    WeightCompressor(module=gptq, config=gptq.Config()),
)
CUTS = {f"blocks.{i}.mlp.mid": tuple(range(0, 80, 2)) for i in range(3)} | {"blocks.1.attn.kv": (0, 2)}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def original(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    save_tiny(tiny_model("llama", tied=request.param), path)
    return path


def sample(rows, seed):
    return torch.randint(3, VOCAB, (rows, 64), generator=torch.Generator().manual_seed(seed))


def written(original, out, cuts, *, held_out=None, bits="int4g32"):
    """Compress with GPTQ; gives what `apply_plan` returns."""
    checkpoint = open_checkpoint(original)
    layout = build_layout(checkpoint.config)
    biases = tuple(u.out_weight for u in layout.units.values() if cuts.get(u.dim))
    plan = make_plan(layout, lambda _, n: runs((n, bits)), cuts, biases)
    stream = BlockStream(checkpoint, layout, torch.float32)
    stats = collected(stream, sample(40, 0), out.parent / f"{out.name}-stats")
    with writing(out, layout, plan) as writer:
        rows = taught(stream, held_out, out.parent)
        return apply_plan(stream, plan, sample(40, 0), GPTQ, refit.Config(), stats, writer, lambda *_: None, *rows)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_known_is_not_run_again_and_the_kl_is_real(model_type, tmp_path, monkeypatch):
    """The bytes are those of running every half anew; the KL is that of full logits, with tied heads and soft caps."""
    original = tmp_path / "original"
    save_tiny(tiny_model(model_type).bfloat16(), original)
    found = written(original, tmp_path / "quick", CUTS, held_out=sample(3, 1))
    monkeypatch.setattr(
        _Job, "_advance_compressed", lambda job, i, _u, block, _p: job._advance(job.compressed, i, block)
    )
    written(original, tmp_path / "slow", CUTS)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("quick", "slow")]
    assert files[0] == files[1]
    assert found == pytest.approx(true_kls(original, tmp_path / "quick"), rel=0.05)  # the stream's table is in bf16


def test_the_kl_counts_that_norms_and_biases_are_stored_in_bf16(tmp_path):
    model = tiny_model("qwen2", tied=False)  # has biases
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.bfloat16().float()
    save_tiny(model, tmp_path / "original")
    found = written(tmp_path / "original", tmp_path / "small", {}, held_out=sample(3, 1), bits="bf16")
    assert min(found) > 1e-7  # nothing but the rounding of vectors
    assert found == pytest.approx(true_kls(tmp_path / "original", tmp_path / "small"), rel=0.02)


def true_kls(original, small):
    """KL(original || small) of each row of `sample(3, 1)`, through transformers alone."""
    with torch.no_grad():
        q, p = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(sample(3, 1))
            .logits.double()
            .log_softmax(-1)
            for path in (small, original)
        )
    return (p.exp() * (p - q)).sum(-1).mean(-1).tolist()


def run(original, out, method, *, plan=None, bits="int3g32", cuts=None, refits=False, rows=80):
    """Compress, and give the mean squared error of the logits on other tokens."""
    checkpoint = open_checkpoint(original)
    layout = build_layout(checkpoint.config)
    biases = tuple(u.out_weight for u in layout.units.values() if u.dim in (cuts or {})) if refits else ()
    plan = plan or make_plan(layout, lambda w, n: runs((n, "bf16" if w.row_axis == "vocab" else bits)), cuts, biases)
    stream, done = BlockStream(checkpoint, layout, torch.float32), []
    stats = collected(stream, sample(rows, 0), out.parent / f"{out.name}-stats")
    with writing(out, layout, plan) as writer:
        repair = refit.Config()
        apply_plan(stream, plan, sample(rows, 0), method, repair, stats, writer, lambda *step: done.append(step))
    assert done == [(1, 3), (2, 3), (3, 3)]
    with torch.no_grad():
        small, large = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (out, original))
        return float((small(sample(8, 1)).logits - large(sample(8, 1)).logits).square().mean())


def test_gptq_beats_rtn(original, tmp_path):
    assert run(original, tmp_path / "gptq", GPTQ) < 0.9 * run(original, tmp_path / "rtn", RTN)


@pytest.mark.parametrize("method", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_a_refit_makes_up_for_a_cut(original, tmp_path, method):
    kept = run(original, tmp_path / "kept", method, bits="int8g32", cuts=CUTS)
    assert run(original, tmp_path / "refit", method, bits="int8g32", cuts=CUTS, refits=True) < 0.9 * kept


@pytest.mark.parametrize(("rows", "held"), [(1, 8), (2, 64), (3, 64), (20, 128), (160, 1280)])
def test_a_ridge_is_chosen_on_what_it_was_not_fitted_to(original, tmp_path, monkeypatch, rows, held):
    """An eighth of the rows, in one chunk or several; of a lone row, the end."""
    counts, real = [], refit.refit

    def spy(w, w_kept, bias, train, held, config):
        counts.append((train.count, held.count))
        return real(w, w_kept, bias, train, held, config)

    monkeypatch.setattr(refit, "refit", spy)
    cuts = {"blocks.0.mlp.mid": (1, 2, 3)}
    run(original, tmp_path / "out", RTN, cuts=cuts, refits=True, rows=rows)
    assert counts == [(64 * rows - held, held)]


def test_same_input_same_bytes(original, tmp_path):
    for name in ("a", "b"):
        run(original, tmp_path / name, GPTQ, cuts=CUTS, refits=True, rows=40)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("seconds", "left"), [(0.0, 1), (60.0, 3)])
def test_an_interrupted_application_goes_on_to_the_same_bytes(original, tmp_path, monkeypatch, seconds, left):
    """From the last block after which enough time had passed to keep what goes into the next."""
    monkeypatch.setattr(carried, "SECONDS", seconds)
    whole = written(original, tmp_path / "whole", CUTS, held_out=sample(3, 1))
    (tmp_path / "partial").mkdir()

    def go_on(progress):
        checkpoint = open_checkpoint(original)
        layout = build_layout(checkpoint.config)
        plan = load_plan(tmp_path / "whole" / "plan.json")
        stream, stats = BlockStream(checkpoint, layout, torch.float32), Stats(tmp_path / "whole-stats", 2560)
        writer = Writer(tmp_path / "partial", layout, plan)
        rows = taught(stream, sample(3, 1), tmp_path)
        kls = apply_plan(stream, plan, sample(40, 0), GPTQ, refit.Config(), stats, writer, progress, *rows)
        writer.finish()
        return kls

    def kill(done, _total):
        if done == 2:
            raise KeyboardInterrupt

    steps = []
    with pytest.raises(KeyboardInterrupt):
        go_on(kill)
    assert go_on(lambda *step: steps.append(step)) == whole
    assert len(steps) == left
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("whole", "partial")]
    assert files[0] == files[1]


def test_a_bad_plan_is_refused_before_anything_is_written(original, tmp_path):
    layout = build_layout(open_checkpoint(original).config)
    plan = make_plan(layout).model_copy(update={"biases": ("nothing",)})
    with pytest.raises(PlanError, match="nothing cannot gain a bias"):
        run(original, tmp_path / "out", RTN, plan=plan)
    assert not (tmp_path / "out").exists()


def test_a_failing_quantiser_names_the_weight(original, tmp_path):
    def quantize_all(*_):
        raise NumericsError("no")

    broken = ModuleType("broken")
    broken.quantize_all, broken.NEEDS_MOMENTS = quantize_all, False
    method = WeightCompressor(module=broken, config=rtn.Config())
    with pytest.raises(NumericsError, match=r"^model\.layers\.0\.self_attn\.q_proj: no$"):
        run(original, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()
