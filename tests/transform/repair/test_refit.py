"""The refit against least squares, on noise, and its bias."""

import numpy as np
import pytest
import torch

from trimbit.calibrate.moments import Moments
from trimbit.transform.repair import refit

KEEP = [0, 2, 3, 5, 8, 9, 11]
RIDGES = (1e-4, 1e-2, 1.0)


def sample(tokens, generator, *, correlated=True):
    """Inputs of 12 dense channels with a mean, and the compressed path's noisy copy of 7 of them."""
    dense = torch.randn(tokens, 12, generator=generator, dtype=torch.float64)
    if correlated:
        mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        dense = dense @ mix + torch.arange(12)
    return dense, dense[:, KEEP] + 0.1 * torch.randn(tokens, 7, generator=generator, dtype=torch.float64)


def moments(dense, x):
    n = len(x)
    return Moments(
        count=n,
        h=(x.T @ x / n).float(),
        mean=x.mean(0).float(),
        cross=(dense.T @ x / n).float(),
        dense_mean=dense.mean(0).float(),
    )


@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_least_squares(with_bias, generator):
    dense, x = sample(20_000, generator)
    w = torch.randn(5, 12, generator=generator)
    bias = torch.randn(5, generator=generator) if with_bias else None
    y = dense @ w.T.double() + (bias.double() if with_bias else 0)
    m = moments(dense, x)
    got = refit.refit(w, w[:, KEEP], bias, m, m, refit.Config(ridges=(1e-7,)))
    want, *_ = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y.numpy(), rcond=None)
    assert got.ridge == 1e-7
    torch.testing.assert_close(got.weight, torch.from_numpy(want[:-1].T).float(), rtol=0, atol=2e-3)
    torch.testing.assert_close(got.bias, torch.from_numpy(want[-1]).float(), rtol=0, atol=2e-3)

    def error(weight, offset):
        return float((x @ weight.T.double() + offset.double() - y).square().sum(1).mean())

    kept = refit.refit(w, w[:, KEEP], bias, m, m, refit.Config(ridges=()))
    assert kept.ridge is None
    assert torch.equal(kept.weight, w[:, KEEP])
    assert error(got.weight, got.bias) < 0.9 * error(kept.weight, kept.bias)
    # what it reports is the true held-out error up to a constant
    assert kept.error - got.error == pytest.approx(
        error(kept.weight, kept.bias) - error(got.weight, got.bias), rel=1e-3
    )


def test_noise_keeps_the_weight(generator):
    """Independent channels on an exact path have nothing to gain; ten tokens pretend otherwise."""
    w = torch.randn(5, 12, generator=generator)
    few, many = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (10, 20_000))
    train, held = (moments(dense, dense[:, KEEP]) for dense in (few, many))
    assert refit.refit(w, w[:, KEEP], None, train, train, refit.Config()).ridge == min(refit.Config().ridges)
    chosen = refit.refit(w, w[:, KEEP], None, train, held, refit.Config())
    assert chosen.ridge is None
    assert torch.equal(chosen.weight, w[:, KEEP])


def test_a_sample_in_between_takes_a_ridge_in_between(generator):
    w = torch.randn(5, 12, generator=generator)
    train, held = (moments(*sample(n, generator)) for n in (12, 20_000))
    fits = {
        r: refit.refit(w, w[:, KEEP], None, train, held, refit.Config(ridges=r))
        for r in [(), *((r,) for r in RIDGES), RIDGES]
    }
    best = fits.pop(RIDGES)
    assert best.error == min(fit.error for fit in fits.values())
    assert best.ridge == 1e-2


def test_a_dead_input_is_no_trouble(generator):
    w = torch.randn(5, 12, generator=generator)
    zero = moments(torch.zeros(10, 12).double(), torch.zeros(10, 7).double())
    fit = refit.refit(w, w[:, KEEP], None, zero, zero, refit.Config())
    assert torch.equal(fit.weight, w[:, KEEP])
    assert not fit.bias.any()


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_bias_keeps_the_mean_output(with_bias, generator):
    dense, x = sample(500, generator)
    w, quantised = torch.randn(5, 12, generator=generator), torch.randn(5, 7, generator=generator)
    bias = torch.randn(5, generator=generator) if with_bias else None
    offset = refit.bias_for(w, quantised, bias, moments(dense, x))
    want = (dense @ w.T.double()).mean(0) + (bias.double() if with_bias else 0)
    torch.testing.assert_close((x @ quantised.T.double()).mean(0) + offset.double(), want, rtol=0, atol=1e-4)
