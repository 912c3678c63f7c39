"""The model under masks: at the ends it is the plain quantised model, and its gradients are those of the formula."""

from functools import partial, partialmethod

import pytest
import torch
from torch.nn import functional

from tiny import MODEL_TYPES, save_tiny, tiny_model
from trimbit.artifact.files import weight_nbytes
from trimbit.calibrate.inverse import damped
from trimbit.errors import NumericsError, RecipeError
from trimbit.evaluate.perplexity import final_hidden
from trimbit.pipeline.recipes import load_recipe
from trimbit.pipeline.session import compress, open_session
from trimbit.runtime.load import load_model
from trimbit.schema.plan import load_plan
from trimbit.schema.recipe import Recipe, Step
from trimbit.search.methods import toga
from trimbit.search.two_formats.tiles import TileProblem
from trimbit.transform.quant import gptq
from trimbit.trial.masked import model as masked_model
from trimbit.trial.masked.expected import along, squares
from trimbit.trial.masked.inputs import MaskedLinear
from trimbit.trial.masked.model import MaskedModel
from trimbit.trial.masked.residuals import Residuals

ACTS = {"low_acts": {"bits": 4, "group": 32, "clip": 0.9}, "high_acts": {"bits": 8, "group": 32}}
PARAMS = {"low": "int3g32", "high": "int8g32", "tile": 16, "steps": 6, "length": 16, "share": 0.25, "save_every": 2}


def recipe(**params):
    return Recipe(
        description="",
        source="",
        compute="float32",
        calibration={"rows": 6, "length": 32, "held_out": 2, "training": 3},
        search=Step(name="toga", params=PARAMS | params),
        quant=Step(name="rtn", params={"scales": "mse"}),
        repair=None,
    )


def session(job, **params):
    return open_session(job.model, recipe(**params), calibration=str(job.text), seed=3)


def gradients(model, masks, step):
    return model.gradients(masks, step, torch.Generator().manual_seed(step))


@pytest.mark.parametrize("acts", [{}, ACTS], ids=["weights", "activations, too"])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("end", [0, 1])
def test_at_both_ends_it_is_the_plain_quantised_model(job, tmp_path, acts, sort, end):
    made = session(job, sort=sort, **acts)
    config = made.search[1]
    problem = made.problem(10**9)
    sites = TileProblem(problem, config)
    high = {site: range(end * count) for site, count in sites.channels.items()}
    written = made.write(sites.plan(high, "an end"), tmp_path / "end")
    masks = {site: torch.full((count,), float(end)) for site, count in sites.channels.items()}
    masked = made.masked(config)
    found = masked.damage(masks)
    assert found.kl == pytest.approx(written.found_by.measured_damage, rel=2e-2)
    assert found.kl > (0.01 if end == 0 else 1e-6)
    packed, row = load_model(tmp_path / "end", torch.float32), made.held_out.tokens[0]
    with torch.no_grad():
        torch.testing.assert_close(masked._final(row), final_hidden(packed, row), rtol=0, atol=1e-3)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_under_masks(job, tmp_path, model_type):
    save_tiny(tiny_model(model_type).bfloat16(), tmp_path / "model")
    made = open_session(tmp_path / "model", recipe(**ACTS), calibration=str(job.text), seed=3)
    sites = TileProblem(made.problem(10**9), made.search[1])
    made.write(sites.plan(dict.fromkeys(sites.channels, ()), "all low"), tmp_path / "low")
    masked, row = made.masked(made.search[1]), made.held_out.tokens[0]
    masked._set({site: torch.zeros(count) for site, count in sites.channels.items()})
    packed = load_model(tmp_path / "low", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(masked._final(row), final_hidden(packed, row), rtol=0, atol=1e-3)


@pytest.mark.parametrize("acts", [{}, ACTS], ids=["weights", "activations, too"])
@pytest.mark.parametrize("loss", ["lm", "kl"])
def test_gradients_are_those_of_the_formula(job, monkeypatch, acts, loss):
    made = session(job, loss=loss, **acts)
    model = made.masked(made.search[1])
    generator = torch.Generator().manual_seed(0)
    masks = {
        site: (torch.rand(len(layers[0].inputs.order), generator=generator) < 0.5).float()
        for site, layers in model.layers.items()
    }
    value, found = gradients(model, masks, 1)
    model.checkpointing = False
    plain_value, plain = gradients(model, masks, 1)
    assert plain_value == value
    assert all(torch.equal(plain[site], own) for site, own in found.items())
    assert all(
        layer.inputs.last is None for layers in model.layers.values() for layer in layers
    )  # or checkpointing is in vain

    def formula(layer, x):
        """Both products, by autograd; rounding passes gradients straight through."""
        order = layer.inputs.order
        x, m = x[..., order], layer.inputs.mask[order]
        kinds = zip(layer.inputs.acts, (m < 0.5, m > 0.5), strict=True)
        low, high = (x if acts is None else x + (nearest(x.detach(), acts, own) - x.detach()) for acts, own in kinds)
        w_low, w_high = (own.packed.dense(x.dtype) for own in (layer.low, layer.high))
        return ((1 - m) * low) @ w_low.T + (m * high) @ w_high.T

    def nearest(x, acts, counted):
        """With the scales of the counted channels, in groups of their own; another has that of the next one."""
        top, stored = 2 ** (acts.bits - 1) - 1, (counted if counted.any() else ~counted).nonzero()[:, 0]
        groups = [acts.clip / top * x[..., part].abs().amax(-1, keepdim=True) for part in stored.split(32)]
        places = [min(int((stored < channel).sum()), len(stored) - 1) for channel in range(x.shape[-1])]
        scale = torch.cat([groups[place // 32] for place in places], -1)
        return (x / scale).round().clamp(-top - 1, top) * scale

    monkeypatch.setattr(MaskedLinear, "forward", formula)
    row = model.rows[1]
    leaves = {site: mask.clone().requires_grad_() for site, mask in masks.items()}
    model._set(leaves)
    logits = model.head(model._final(row)[:-1])
    if loss == "lm":
        want = functional.cross_entropy(logits, row[1:])
    else:
        taught = functional.linear(model.original.hidden(row)[:-1], made.stream.head().keywords["weight"]).log_softmax(
            -1
        )
        want = (taught.exp() * (taught - logits.log_softmax(-1))).sum(-1).mean()
    assert value == pytest.approx(float(want.detach()), rel=1e-4)
    want.backward()
    for site, leaf in leaves.items():
        torch.testing.assert_close(found[site], leaf.grad, rtol=2e-3, atol=2e-6, msg=site)
    assert len(found) == 12


@pytest.mark.parametrize("acts", [{}, ACTS], ids=["weights", "activations, too"])
def test_kept_dense_they_give_the_same(job, acts):
    found = []
    for dense in (True, False):
        made = session(job, dense=dense, **acts)
        model = made.masked(made.search[1])
        assert all((layer.low.packed is None) == dense for layers in model.layers.values() for layer in layers)
        masks = {site: torch.arange(len(own[0].inputs.order)) % 3 // 2 for site, own in model.layers.items()}
        found.append(gradients(model, {site: mask.float() for site, mask in masks.items()}, 0))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(own, found[1][1][site]) for site, own in found[0][1].items())


@pytest.mark.parametrize("kind", ["rtn", "expected"])
def test_what_is_tried_around_a_background_is_judged_as_if_alone(job, kind):
    made = session(job, loss="kl", error_model=kind)  # so that the original's answers on these rows are there
    model = made.masked(made.search[1])
    zeros = {site: torch.zeros(len(own[0].inputs.order)) for site, own in model.layers.items()}
    tried = [zeros] + [zeros | {site: torch.ones(len(zeros[site]))} for site in zeros] + [zeros]
    around = [model.damage(masks, 3) for masks in tried]
    for masks, found in zip(tried, around, strict=True):
        model.backgrounds.clear()
        assert found == pytest.approx(model.damage(masks, 3), rel=1e-6)
    model.held_out = model.rows[:3]
    for alone, found in zip([model.damage(masks) for masks in tried], around, strict=True):
        assert found.kl == pytest.approx(alone.kl, rel=1e-3, abs=2e-5)
        assert found.nll == pytest.approx(alone.nll, rel=1e-6)
    assert len({found.kl for found in around}) == len(zeros) + 1


def test_squares_are_a_mean_for_each_row_and_group_times_a_factor_for_each_column(generator):
    rows = torch.rand(6, 3, generator=generator)
    cols = torch.rand(80, generator=generator)
    separable = (rows.repeat_interleave(32, 1)[:, :80] * cols).sqrt()
    for group in (32, None):
        errors = separable if group else (rows[:, :1] * cols).sqrt()
        found = squares(errors, group)
        torch.testing.assert_close(found.rows @ found.cols.T, errors.square())
    errors = 0.01 * torch.randn(6, 80, generator=generator)
    errors[2, :32] = errors[:, 64:] = 0  # a group without errors, in one row and in all
    found = squares(errors, 32)
    product = found.rows @ found.cols.T
    torch.testing.assert_close(product.sum(0), errors.square().sum(0))
    for part, want in zip(product.split(32, 1), errors.square().split(32, 1), strict=True):
        torch.testing.assert_close(part.sum(1), want.sum(1))


def test_what_is_along_the_weight_is_the_least_squares_factor_of_each_column(generator):
    w, rest = torch.randn(2, 6, 8, generator=generator)
    w[:, 3] = 0
    rest -= w * (rest * w).sum(0) / w.square().sum(0).clamp(min=1e-9)  # of each column, at right angles to it
    factors = torch.rand(8, generator=generator)
    factors[3] = 0
    torch.testing.assert_close(along(factors * w + rest, w), factors)


@pytest.mark.parametrize("rank", [0, 20, 80, 100])
def test_residuals_of_low_rank_have_the_mean_squares_of_all(rank, generator):
    x = torch.randn(400, 80, generator=generator) @ torch.randn(80, 80, generator=generator)
    h = (x.T @ x / len(x)).double()
    exact = gptq.residuals(h, (60, 20), gptq.Config(damping=0.0))
    found = Residuals(exact, h, rank, torch.float32)
    r = found(x)
    want = x.double() @ exact.T
    torch.testing.assert_close(r.square().mean(0), want.square().mean(0).float(), rtol=1e-3, atol=0)
    scaled = x * (want.square().mean(0) / x.square().mean(0)).sqrt()  # without any prediction
    missed, nothing = ((own - want).square().mean() for own in (r, scaled))
    if rank:
        assert missed < (0.9 if rank < 80 else 1e-6) * nothing
    else:
        assert float(missed / nothing) == pytest.approx(1, rel=1e-4)
    grad = torch.randn(r.shape, generator=generator)
    leaf = x.requires_grad_()
    (found(leaf) * grad).sum().backward()
    torch.testing.assert_close(found.back(grad), leaf.grad)


def expected_layer(job, **params):
    made = session(job, error_model="expected", **params)
    model = made.masked(made.search[1])
    layer = model.layers["blocks.1.mlp.mid"][0]
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, layer.weight.shape[1], generator=generator)
    mask = (torch.rand(layer.weight.shape[1], generator=generator) < 0.5).float()
    return made, layer, x, mask


FORMATS = {"as they are": {}, "not sorted": {"sort": False}, "rows": {"low": "int3row", "high": "int8row"}}


@pytest.mark.parametrize("more", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("acts", [{}, ACTS], ids=["weights", "activations, too"])
def test_expected_errors_have_the_mean_and_the_variance_of_the_formula(job, acts, more):
    made, layer, x, mask = expected_layer(job, **acts, **more)
    site, name = "blocks.1.mlp.mid", made.layout.readers("blocks.1.mlp.mid")[0].name
    weight = made.checkpoint.tensor(f"{name}.weight").float()
    order, h = layer.inputs.order, made.stats.moments(site).h
    ranked = h.diagonal().argsort()  # GPTQ's: all that is low, then a fourth that is high
    high = round(0.25 * len(order))
    unranked = ranked.argsort()
    exact = gptq.residuals(h[ranked][:, ranked], (len(order) - high, high), gptq.Config())[unranked][:, unranked]
    reckoned = damped(h.double(), gptq.Config().damping)
    residuals = Residuals(exact, reckoned, made.search[1].rank, torch.float32)
    layer.inputs.mask = mask
    low, high, *_ = layer.inputs(x)
    mixed, variance = torch.where(mask > 0.5, high, low), 0
    r, mean = residuals(mixed), mixed @ weight.T
    for kind, chosen in (("low", mask < 0.5), ("high", mask > 0.5)):
        near = session(job, error_model="rtn", **acts, **more)
        version = getattr(near.masked(near.search[1]).layers[site][0], kind).dense(torch.float32)
        a = along(weight - version, weight)
        found = squares((weight - version - a * weight)[:, order], None if "low" in more else 32)
        mean = mean - (a * chosen * r) @ weight.T
        variance = variance + (r * chosen).square() @ (found.rows @ found.cols[order.argsort()].T).T
    draws = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        layer.draw(generator)
        layer.inputs.last = None
        draws.append(layer(x))
    draws = torch.stack(draws)
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=5 * float(variance.max().sqrt()) / 3000**0.5)
    torch.testing.assert_close(draws.var(0), variance, rtol=0.2, atol=0)
    assert float(draws.var(0).mean() / variance.mean()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("acts", [{}, ACTS], ids=["weights", "activations, too"])
def test_gradients_of_expected_errors_are_those_of_the_formula(job, acts):
    _, layer, x, mask = expected_layer(job, **acts)
    layer.draw(torch.Generator().manual_seed(7))
    xi = torch.randn(5, len(layer.weight), generator=torch.Generator().manual_seed(layer.seed))
    weights = torch.randn(xi.shape, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_(), mask.clone().requires_grad_()]
    layer.inputs.mask = leaves[1]
    (layer(leaves[0]) * weights).sum().backward()

    plain = [x.clone().requires_grad_(), mask.clone().requires_grad_()]
    layer.inputs.mask = mask
    rounded = [plain[0] + (own - plain[0]).detach() for own in layer.inputs(x)[:2]]
    shares = (1 - plain[1], plain[1])
    mixed = sum(share * own for share, own in zip(shares, rounded, strict=True))
    r, noises = layer.inputs.residuals(mixed), (layer.low, layer.high)
    mean = (mixed - sum(share * noise.along * r for share, noise in zip(shares, noises, strict=True))) @ layer.weight.T
    variance = sum(
        (share * r.square()) @ noise.cols @ noise.rows.T for share, noise in zip(shares, noises, strict=True)
    )
    ((mean + xi * variance.sqrt()) * weights).sum().backward()
    for leaf, want in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, want.grad, rtol=1e-4, atol=1e-4)


def test_no_error_has_no_noise_and_no_gradient_from_noise(job):
    """Where all channels are high, in a format without rounding."""
    _, layer, x, mask = expected_layer(job, high="bf16")
    layer.draw(torch.Generator().manual_seed(7))
    layer.inputs.mask = torch.ones_like(mask).requires_grad_()
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, x @ layer.weight.T)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))
    shrinking = layer.low.along * layer.inputs.residuals(x.detach()) * layer.weight.sum(0)  # of what became low
    torch.testing.assert_close(layer.inputs.mask.grad, shrinking.sum(0))


@pytest.mark.parametrize("kind", ["rtn", "expected"])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_bf16_on_a_cpu_with_instructions_for_it_or_without(job, monkeypatch, kind, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = []
    for compute in ("bfloat16", "float32"):
        own = recipe(error_model=kind, loss="kl", **ACTS).model_copy(update={"compute": compute})
        made = open_session(job.model, own, calibration=str(job.text), seed=3)
        model = made.masked(made.search[1])
        native = torch.bfloat16 if (compute, capability) == ("bfloat16", "AVX512") else torch.float32
        assert model.layers["blocks.1.mlp.mid"][0].inputs.compute is native
        masks = {site: (torch.arange(len(own[0].inputs.order)) % 2).float() for site, own in model.layers.items()}
        found.append((model.damage(masks).nll, model.damage(masks, 1).nll, gradients(model, masks, 0)[0]))
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_noise_is_a_row_s_own_and_comes_again(job):
    made = session(job, error_model="expected", loss="kl", batch=2)
    model = made.masked(made.search[1])
    masks = {site: torch.zeros(len(layers[0].inputs.order)) for site, layers in model.layers.items()}
    judged = model.damage(masks)
    first = gradients(model, masks, 0)
    assert model.damage(masks) == judged
    model.checkpointing = False
    again = gradients(model, masks, 0)
    assert again[0] == first[0]
    assert all(torch.equal(own, first[1][site]) for site, own in again[1].items())
    model.rows, generator = model.rows[:1], torch.Generator().manual_seed(0)
    twice = gradients(model, masks, 0)[0]
    model.batch = 1
    each = [model.gradients(masks, 0, generator)[0] for _ in range(2)]
    assert each[0] != each[1]
    assert twice == pytest.approx(sum(each) / 2, rel=1e-6)
    model.held_out = model.rows[:1].expand(2, -1)
    generators = []
    model._draw = lambda generator: generators.append(generator.initial_seed())
    model.damage(masks)
    model.damage(masks, 1)
    assert generators == [0, 1, 0, 0]  # the first is for the background


def test_every_step_takes_the_next_rows(job):
    made = session(job, batch=2)
    model = made.masked(made.search[1])
    assert model.rows.shape == (6, 16)  # 3 rows of 32
    assert set(map(tuple, model.rows.tolist())).isdisjoint(map(tuple, made.tokens.tokens.view(-1, 16).tolist()))
    masks = {site: torch.ones(len(layers[0].inputs.order)) for site, layers in model.layers.items()}
    values = [gradients(model, masks, step)[0] for step in range(4)]
    assert values[0] == values[3] != values[1]
    model.batch = 6
    assert gradients(model, masks, 0)[0] == pytest.approx(sum(values[:3]) / 3, rel=1e-5)


def test_the_versions_are_the_quantiser_s_if_asked(job):
    near, own = (session(job, error_model=kind) for kind in ("rtn", "quantizer"))
    own.quant = replace_quant(own)
    layers = [made.masked(made.search[1]).layers["blocks.1.mlp.mid"][0] for made in (near, own)]
    assert not torch.equal(layers[0].low.packed.codes, layers[1].low.packed.codes)


def replace_quant(made):
    made.recipe = made.recipe.model_copy(update={"quant": Step(name="gptq")})
    return gptq, gptq.Config()


@pytest.mark.parametrize("acts", [{}, ACTS], ids=["weights", "activations, too"])
@pytest.mark.parametrize("kind", ["rtn", "expected"])
def test_the_whole_job(job, tmp_path, acts, kind):
    """Within its budget; the file is what the plan says; the packed model is near what the search saw."""
    own = recipe(error_model=kind, **acts)
    if kind == "expected":  # of GPTQ, on text enough for its H
        rows = own.calibration.model_copy(update={"rows": 24})
        own = own.model_copy(update={"quant": Step(name="gptq"), "calibration": rows})
    made = open_session(job.model, own, calibration=str(job.text), seed=3)
    plan = made.find_plan(None)
    written = made.write(plan, tmp_path / "out")
    limit = made.limit(None)
    assert (tmp_path / "out/model.safetensors").stat().st_size == written.found_by.nbytes <= limit
    assert load_plan(tmp_path / "out/plan.json") == written
    kl = float(written.found_by.notes[0].split("KL ")[1].split(",")[0])
    # groups restart at the high channels, or GPTQ rounds for real
    assert written.found_by.measured_damage == pytest.approx(kl, rel=0.3)
    lines = (tmp_path / "out/training.csv").read_text().splitlines()
    assert lines[0] == "step,loss,bits,temperature"
    assert len(lines) == 7
    assert (tmp_path / "out/training.png").read_bytes().startswith(b"\x89PNG")


def test_a_job_that_was_broken_off_goes_on(job, tmp_path, monkeypatch):
    """As the recipes learn: a hypernetwork, expected errors, bf16, whole tiles."""
    kind = {"error_model": "expected", "network": "hypernetwork", "budget": "projection", "loss": "kl"}
    learnt = recipe(**kind, whole_tiles=True).model_copy(update={"compute": "bfloat16"})
    steps, gradients = [], MaskedModel.gradients

    def found():
        steps.clear()
        made = open_session(job.model, learnt, calibration=str(job.text), seed=3)
        plan = made.find_plan(None)
        return plan, made.curves[plan.content]

    def counted(self, masks, step, generator, stop=None):
        steps.append(step)
        if step == stop:
            raise KeyboardInterrupt
        return gradients(self, masks, step, generator)

    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path / "at once"))
    monkeypatch.setattr(MaskedModel, "gradients", counted)
    at_once = found()
    assert steps == list(range(6))
    monkeypatch.setenv("TRIMBIT_CACHE", str(tmp_path / "broken off"))
    monkeypatch.setattr(MaskedModel, "gradients", partialmethod(counted, stop=3))
    with pytest.raises(KeyboardInterrupt):
        found()
    monkeypatch.setattr(MaskedModel, "gradients", counted)
    assert found() == at_once
    assert steps == [2, 3, 4, 5]


def test_what_is_learnt_in_is_let_go_before_the_plan_is_applied(job):
    made = session(job)
    made.find_plan(None)
    assert made._masked is None


def test_more_text_than_there_is_is_refused_at_once(job):
    with pytest.raises(RecipeError, match=r"search\.length is 64 tokens, but a row has 32"):
        session(job, length=64)
    search = Step(name="shares", params={"low": "int3g32", "high": "int8g32", "tile": 16, "length": 16, "rows": 7})
    with pytest.raises(RecipeError, match=r"search\.rows: 7 of 6 rows asked"):
        open_session(job.model, recipe().model_copy(update={"search": search}), calibration=str(job.text), seed=3)


def test_damage_that_is_not_finite_stops_the_search(job, tmp_path):
    search = Step(name="shares", params={"low": "int3g32", "high": "int8g32", "tile": 16, "length": 16, "rows": 2})
    made = open_session(
        job.model, recipe().model_copy(update={"search": search}), calibration=str(job.text), seed=3, cache=tmp_path
    )
    made.masked(made.search[1]).layers["blocks.1.mlp.mid"][0].weight[0] = torch.nan
    with pytest.raises(NumericsError, match="the model under masks is not finite: KL nan"):
        made.find_plan(None)
    made.find_plan(None)  # what was not finite was not kept


# As they come along, but for the size of the text and of groups, and the number of steps.
TINY = ("calibration.rows=24", "calibration.length=32", "calibration.held_out=2", "search.tile=16", "compute=float32")
LEARNT = ("calibration.training=3", "search.length=16", "search.steps=4")


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("toga-q-w3.2a3.2", "int3g32", "int8g32"),
        ("toga-q-faithful", "binaryg32", "int4g32"),
        ("atom-w3.2a3.2", "int3g32", "int8g32"),
        ("ptq161-w1.6a16", "mbinaryrow", "int4g32"),
    ],
)
def test_the_recipes(job, tmp_path, name, low, high):
    masked, acts = name.startswith("toga"), "a3.2" in name
    own = (f"search.low={low}", f"search.high={high}", *TINY, *(LEARNT if masked else ()))
    own += ("search.low_acts.group=32", "search.high_acts.group=32") if acts else ()
    made = open_session(job.model, load_recipe(name, own), calibration=str(job.text), seed=3)
    plan = compress(made, None, tmp_path / "out")
    assert weight_nbytes(tmp_path / "out") == plan.found_by.nbytes <= made.limit(None)
    formats = {run.precision.name for runs in plan.weights.values() for run in runs}
    assert formats >= {low, high}
    assert bool(plan.acts) == acts
    assert plan.found_by.measured_damage > 0
    assert (tmp_path / "out/training.csv").exists() == masked


def test_what_decides_the_masks_is_in_their_key(job):
    """Pairs take bytes, and so decide how many channels are learnt to be high; another quantiser serves them all."""
    base = recipe()
    others = {
        "rank": base.model_copy(update={"lowrank": Step(name="lowrank", params={"rank": 2})}),
        "training": base.model_copy(update={"calibration": base.calibration.model_copy(update={"training": 2})}),
        "steps": recipe(steps=7),
        "quantiser": base.model_copy(update={"quant": Step(name="gptq")}),
    }
    keys = {
        name: open_session(job.model, own, calibration=str(job.text), seed=3).problem(40_000).key
        for name, own in {"base": base, **others}.items()
    }
    assert keys["quantiser"] == keys["base"]
    assert len(set(keys.values())) == 4


def test_what_errors_are_expected_of_is_in_the_key(job):
    def key(**quant):
        own = recipe(error_model="expected").model_copy(update={"quant": Step(**quant)})
        return open_session(job.model, own, calibration=str(job.text), seed=3).problem(40_000).key

    assert key(name="rtn") == key(name="gptq") == key(name="gptq", params={"damping": 0.01})
    assert key(name="gptq") != key(name="gptq", params={"damping": 0.1})


class Recorded(torch.autograd.Function):
    """A block whose gradients lie in the same memory in each run, as those of a CUDA graph."""

    @staticmethod
    def forward(ctx, block, kept, *inputs):
        ctx.inputs, ctx.kept = [own.detach().requires_grad_() for own in inputs], kept
        with torch.enable_grad():
            ctx.out = block(*ctx.inputs)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, grad):
        for at, own in enumerate(torch.autograd.grad(ctx.out, ctx.inputs, grad)):
            ctx.kept.setdefault(at, torch.empty_like(own)).copy_(own)
        return None, None, *(own.detach() for own in ctx.kept.values())


def test_rows_of_a_step_add_up_where_blocks_are_replayed(job, monkeypatch):
    made = session(job, dense=True, checkpointing=False, batch=3)
    model = made._make_masked(made.search[1])
    generator = torch.Generator().manual_seed(0)
    masks = {
        site: (torch.rand(len(layers[0].inputs.order), generator=generator) < 0.5).float()
        for site, layers in model.layers.items()
    }
    plain = gradients(model, masks, 0)
    monkeypatch.setattr(
        masked_model, "recorded", lambda blocks, *_: [partial(Recorded.apply, own, {}) for own in blocks]
    )
    monkeypatch.setattr(masked_model, "replay", run_all)
    model.cuda_graphs = True
    for step in (1, 0):
        found = gradients(model, masks, step)
    assert found[0] == pytest.approx(plain[0])
    torch.testing.assert_close(found[1], plain[1])


def run_all(blocks, hidden, masks, _seed):
    for run, own in zip(blocks, masks, strict=True):
        hidden = run(hidden, *own)
    return hidden


@pytest.mark.parametrize(
    ("params", "replayed"),
    [
        ({"error_model": "expected"}, True),
        ({"dense": True}, True),
        ({}, False),  # packed
        ({"dense": True, "low_acts": ACTS["low_acts"]}, False),
        ({"error_model": "expected", "high_acts": ACTS["high_acts"]}, False),
    ],
)
def test_what_a_gpu_replays_is_in_the_key(job, monkeypatch, params, replayed):
    """Noise is another then; on a CPU nothing is replayed, and blocks that are run twice give the same masks."""
    whole = {"checkpointing": False} | params
    config = toga.Config(**recipe(**whole).search.params)
    assert config.cuda_graphs("cuda") == replayed
    assert not config.cuda_graphs("cpu")
    assert not config.model_copy(update={"checkpointing": True}).cuda_graphs("cuda")
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda own=gpu: own)
        keys = {session(job, **whole | {"checkpointing": twice}).problem(40_000).key for twice in (True, False)}
        assert len(keys) == 1 + (gpu and replayed)


EXACT = {"error_model": "expected", "high": "bf16", "loss": "kl"}
REPLAYED = {"low_acts": None, "high_acts": None, "checkpointing": False}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "kind",
    [{}, {"dense": True} | REPLAYED, EXACT, EXACT | REPLAYED | {"loss": "lm"}],
    ids=["rounded", "rounded, replayed", "expected", "expected, replayed"],
)
def test_a_gpu_gives_the_same_gradients(job, monkeypatch, kind):
    """Where noise is expected all channels are exact, for it is another on another kind of device."""
    made = session(job, **ACTS | kind)
    found = []
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda own=gpu: own)
        model = made._make_masked(made.search[1])
        generator, share = torch.Generator().manual_seed(0), 1.0 if "high" in kind else 0.5
        masks = {
            site: (torch.rand(len(layers[0].inputs.order), generator=generator) < share).float()
            for site, layers in model.layers.items()
        }
        assert model.cuda_graphs == (gpu and not kind.get("checkpointing", True))
        gradients(model, {site: 1 - mask for site, mask in masks.items()}, 1)  # what is recorded is none of the masks'
        found.append(gradients(model, masks, 0))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.05, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replayed_noise_is_that_of_its_seed(job):
    made = session(job, **EXACT | REPLAYED | {"high": "int8g32"})
    model = made._make_masked(made.search[1])
    masks = {site: torch.zeros(len(layers[0].inputs.order)) for site, layers in model.layers.items()}
    before = torch.cuda.get_rng_state()
    first, again = (gradients(model, masks, 0) for _ in range(2))
    assert first[0] == again[0]
    torch.testing.assert_close(first[1], again[1], rtol=0, atol=0)
    steps = range(0, 8 * len(model.rows), len(model.rows))  # of one row
    others = [gradients(model, masks, step)[0] for step in steps]
    assert len(set(others)) == 8
    assert torch.equal(torch.cuda.get_rng_state(), before)
    model.cuda_graphs = False
    plain = [gradients(model, masks, step)[0] for step in steps]
    assert sum(others) / 8 == pytest.approx(sum(plain) / 8, rel=0.1)
