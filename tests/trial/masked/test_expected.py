"""Expected errors: their mean, variance, gradients and noise."""

import pytest
import torch

from masked_jobs import ACTS, gradients, recipe, session
from sessions import open_session
from trimbit.calibrate.inverse import damped
from trimbit.pipeline import search
from trimbit.pipeline.masks import expected_gptq
from trimbit.schema.recipe import Step
from trimbit.transform.quant import gptq
from trimbit.trial.masked.expected import along, squares
from trimbit.trial.masked.residuals import Residuals


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


def expected_layer(job, **params):
    made = session(job, error_model="expected", **params)
    model = made.masked(made.steps.search)
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
    order, h = layer.inputs.order, made.prepared.stats.moments(site).h
    ranked = h.diagonal().argsort()  # GPTQ's: all that is low, then a fourth that is high
    high = round(0.25 * len(order))
    unranked = ranked.argsort()
    exact = gptq.residuals(h[ranked][:, ranked], (len(order) - high, high), gptq.Config()).double()
    exact = exact[unranked][:, unranked]
    reckoned = damped(h.double(), gptq.Config().damping)
    residuals = Residuals(exact, reckoned, made.steps.search.rank, torch.float32)
    layer.inputs.mask = mask
    low, high, *_ = layer.inputs(x)
    mixed, variance = torch.where(mask > 0.5, high, low), 0
    r, mean = residuals(mixed), mixed @ weight.T
    for kind, chosen in (("low", mask < 0.5), ("high", mask > 0.5)):
        near = session(job, error_model="rtn", **acts, **more)
        version = getattr(near.masked(near.steps.search).layers[site][0], kind).dense(torch.float32)
        a = along(weight - version, weight)
        found = squares((weight - version - a * weight)[:, order], None if "low" in more else 32)
        mean = mean - (a * chosen * r) @ weight.T
        variance = variance + (r * chosen).square() @ (found.rows @ found.cols[order.argsort()].T).T
    draws = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        layer.draw(generator)
        layer.inputs.last = None
        draws += layer(x.repeat(100, 1)).unflatten(0, (100, 5))
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


def test_noise_is_a_row_s_own_and_comes_again(job):
    made = session(job, error_model="expected", loss="kl", batch=2)
    model = made.masked(made.steps.search)
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


def test_the_quantiser_whose_errors_are_expected_is_in_the_key(job):
    def key(**quant):
        own = recipe(error_model="expected").model_copy(update={"quant": Step(**quant)})
        made = open_session(job.model, own, calibration=str(job.text), seed=3)
        return search._key(made.job, made.prepared, 40_000).digest

    damped_more = {"name": "gptq", "params": {"damping": 0.1}}
    assert key(**damped_more) == key(**damped_more)
    assert len({key(name="rtn"), key(name="gptq"), key(**damped_more)}) == 3


def test_errors_are_expected_of_the_recipe_s_gptq_or_of_the_default_one(job):
    def expected(**quant):
        own = recipe(error_model="expected").model_copy(update={"quant": Step(**quant)})
        return expected_gptq(open_session(job.model, own, calibration=str(job.text), seed=3).job)

    assert expected(name="rtn") == expected(name="gptq") == gptq.Config()
    assert expected(name="gptq", params={"damping": 0.1}) == gptq.Config(damping=0.1)
