"""Estimates of mutual information against numerical integration, closed forms, NumPy's histogram and identities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr, ndtri, xlogy
from scipy.stats import norm

from trimbit.errors import NumericsError
from trimbit.measure.criteria.mutual_information import Config, classes, information

NOISE = 0.02  # of each feature beside the signal, whose variance is 1


def channel(rho, count, samples, features=64, seed=0):
    """A signal along a random direction with a little noise; and quantile classes of a noisy copy of the signal."""
    generator = torch.Generator().manual_seed(seed)
    signal, other = torch.randn(2, samples, generator=generator, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(features, generator=generator, dtype=torch.float64), dim=0)
    noise = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    edges = torch.from_numpy(ndtri(np.arange(1, count) / count))
    y = torch.bucketize(rho * signal + math.sqrt(1 - rho**2) * other, edges)
    return signal.outer(direction) + NOISE * noise, y


def seen(rho):
    """Correlation of the first component of such an x with what y is cut from."""
    return rho / math.sqrt(1 + NOISE**2)


def given_signal(rho, count, s):
    """Probability of each class at the signal s."""
    edges = ndtri(np.arange(count + 1) / count)
    return np.diff(ndtr((edges - rho * s) / math.sqrt(1 - rho**2)))


def cells(rho, levels, count):
    """Probability of each quantile bin of the signal together with each class of y."""
    ends = np.clip(ndtri(np.arange(levels + 1) / levels), -9, 9)

    def density(s, k):
        return norm.pdf(s) * given_signal(rho, count, s)[k]

    return np.array([[quad(density, ends[i], ends[i + 1], (k,))[0] for k in range(count)] for i in range(levels)])


def exact(p):
    """Information of two variables with these joint probabilities, and the spread of its estimate times sqrt(n)."""
    ratio = np.log(p) - np.log(p.sum(1, keepdims=True)) - np.log(p.sum(0, keepdims=True))
    mean = (p * ratio).sum()
    return mean, math.sqrt((p * (ratio - mean) ** 2).sum())


def uncut(rho, count):
    """Information of the signal itself and the class."""
    lost = quad(lambda s: -norm.pdf(s) * xlogy(p := given_signal(rho, count, s), p).sum(), -9, 9)[0]
    return math.log(count) - lost


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(("dims", "levels"), [(1, 4), (1, 8), (2, 4)])
def test_gaussian_channel(rho, dims, levels):
    """Within four standard errors of the truth about the same cells; beyond the first, components are noise."""
    samples = 16_000
    x, y = channel(rho, 6, samples)
    found = information(x, y, Config(dims=dims, levels=levels))
    truth, spread = exact(cells(seen(rho), levels, 6))
    assert found == pytest.approx(truth, abs=4 * spread / math.sqrt(samples))
    assert truth < uncut(rho, 6)


@pytest.mark.parametrize(("rho", "kept"), [(0.5, 0.85), (0.95, 0.77)])
def test_the_default_keeps_most_of_a_gaussian_channel(rho, kept):
    x, y = channel(rho, 8, 32_000)
    assert kept - 0.02 < information(x, y, Config()) / uncut(seen(rho), 8) < kept + 0.02


def test_fine_cells_come_close_to_the_closed_form_from_below():
    """Cells are functions of what they cut, so they know less, never more: here 0.005 to 0.03 nats less."""
    x, y = channel(0.8, 32, 60_000, features=8)
    found = information(x, y, Config(dims=1, levels=32))
    assert 0.005 < -0.5 * math.log(1 - seen(0.8) ** 2) - found < 0.03


def test_components_past_the_first_are_read():
    """Two signals, the weaker of which alone decides y."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8_000, 5, generator=generator) * torch.tensor([0.1, 3.0, 0.1, 1.0, 0.1])
    y = (x[:, 3] > 0).long()
    assert abs(information(x, y, Config(dims=1))) < 0.005
    assert information(x, y, Config(dims=2)) == pytest.approx(math.log(2), abs=0.06)


def test_independence_is_zero_and_the_plug_in_is_biased_up():
    """2n times the plug-in estimate is chi-square with (K_x - 1)(K_y - 1) degrees of freedom."""
    samples, runs, freedom = 4_000, 16, 15 * 15
    generator = torch.Generator().manual_seed(5)
    plug_in, corrected = [], []
    for _ in range(runs):
        x = torch.rand(samples, 1, generator=generator)
        y = torch.randint(16, (samples,), generator=generator)
        plug_in.append(information(x, y, Config(estimator="histogram", bins=16)))
        corrected.append(information(x, y, Config(dims=1, levels=16)))
    error = 4 * math.sqrt(2 * freedom / runs) / (2 * samples)
    assert np.mean(plug_in) == pytest.approx(freedom / (2 * samples), abs=error)
    assert np.mean(corrected) == pytest.approx(0, abs=error)
    assert freedom / (2 * samples) > 5 * error
    assert min(corrected) < 0  # kept


def test_what_decides_the_class_has_all_its_entropy():
    samples = 1_000
    x = torch.randn(samples, 1, generator=torch.Generator().manual_seed(0))
    y = x[:, 0].argsort().argsort() * 4 // samples
    correction = (4 + 4 - 4 - 1) / (2 * samples)
    assert information(x, y, Config(dims=1)) == pytest.approx(math.log(4) + correction, abs=1e-12)
    found = information(y[:, None].float(), y, Config(estimator="histogram"))
    assert found == pytest.approx(math.log(4), abs=1e-12)


def test_rotation_shift_and_scale_of_the_features_change_nothing():
    x, y = channel(0.7, 5, 4_000, features=16)
    x = x * torch.linspace(1, 2, 16) + 3
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2)).double()).Q
    want = information(x, y, Config())
    assert information(x @ rotation, y, Config()) == pytest.approx(want, abs=1e-12)
    assert information(-5 * x + 7, y, Config()) == pytest.approx(want, abs=1e-12)


def test_names_of_the_tokens_change_nothing_but_the_histogram():
    x, y = channel(0.7, 8, 4_000, features=4)
    named = torch.tensor([50_000, 3, 77, 0, 812, 4, 20_001, 9])[y]
    assert information(x, named, Config()) == pytest.approx(information(x, y, Config()), abs=1e-12)
    histogram = Config(estimator="histogram")
    assert information(x, named, histogram) < information(x, y, histogram) - 0.01


@pytest.mark.parametrize("bins", [2, 7, 16])
def test_the_histogram_is_numpys(bins):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 6, generator=generator)
    y = (x.mean(1) * 40 + torch.randn(500, generator=generator) * 10).long() + 300
    p = np.histogram2d(x.double().mean(1).numpy(), y.numpy(), bins=bins)[0] / 500
    free = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    want = (p[p > 0] * np.log(p[p > 0] / free[p > 0])).sum()
    assert information(x, y, Config(estimator="histogram", bins=bins)) == pytest.approx(want, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=2, max_size=60))
def test_the_plug_in_is_between_zero_and_the_smaller_entropy(pairs):
    a, b = torch.tensor(pairs).T
    found = information(a[:, None].float(), b, Config(estimator="histogram"))
    entropies = [-float(xlogy(p := np.unique(v, return_counts=True)[1] / len(v), p).sum()) for v in (a, b)]
    assert -1e-9 <= found <= min(entropies) + 1e-9


@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.integers(1, 8))
def test_classes_are_the_most_frequent_tokens_and_the_rest(tokens, count):
    found = classes(torch.tensor(tokens), count).tolist()
    order = sorted(set(tokens), key=lambda token: (-tokens.count(token), token))
    assert found == [min(order.index(token), count - 1) for token in tokens]


def test_of_many_tokens_as_frequent_the_smaller_ids_come_first():
    order = torch.randperm(1_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(classes(order, 600), order.clamp(max=599))


def test_rare_tokens_are_one_class():
    x, y = channel(0.7, 8, 4_000, features=4)
    want = information(x, y.clamp(max=2), Config())
    y = torch.where(y >= 2, 2 + torch.arange(len(y)), y)  # 0 and 1 are frequent, every other token is seen once
    assert information(x, y, Config(classes=3)) == pytest.approx(want, abs=1e-12)
    assert information(x, classes(y, 3), Config(classes=3)) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("estimator", ["histogram", "quantiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_constant_features_or_classes_tell_nothing(estimator, dtype):
    y = torch.arange(1_000) % 7
    config = Config(estimator=estimator)
    assert information(torch.full((1_000, 3), 0.1, dtype=dtype), y, config) == pytest.approx(0, abs=1e-12)
    x = torch.randn(1_000, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert information(x, torch.zeros_like(y), config) == pytest.approx(0, abs=1e-12)


def test_a_feature_repeated_has_one_component():
    x, y = channel(0.8, 4, 4_000, features=1)
    want = information(x, y, Config(dims=1))
    assert information(x.expand(-1, 5), y, Config(dims=3)) == pytest.approx(want, abs=1e-12)


def test_the_order_of_tied_samples_tells_nothing():
    """Half of the samples are tied at each of two values, and y is the place in the list."""
    x = torch.tensor([0.0, 1.0]).repeat(200)[:, None]
    y = (torch.arange(400) >= 200).long()
    assert information(x, y, Config()) == pytest.approx((2 + 2 - 4 - 1) / 800, abs=1e-12)


def test_two_samples_are_enough_and_one_is_not():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([5, 9])
    assert information(x, y, Config(estimator="histogram")) == pytest.approx(math.log(2))
    assert math.isfinite(information(x, y, Config()))
    with pytest.raises(AssertionError, match="two samples"):
        information(x[:1], y[:1], Config())


@pytest.mark.parametrize("estimator", ["histogram", "quantiles"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_what_is_not_finite(estimator, value):
    x = torch.zeros(4, 2)
    x[1, 1] = value
    with pytest.raises(NumericsError, match="not finite"):
        information(x, torch.arange(4), Config(estimator=estimator))
