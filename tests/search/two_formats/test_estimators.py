"""Gradients of binary samples against exact enumeration."""

from itertools import product

import pytest
import torch

from trimbit.search.two_formats.estimators import sample

LOGITS = torch.tensor([0.7, -1.3, 2.0])
A = torch.tensor([[0.5, -1.0, 0.3], [-1.0, 1.2, 0.7], [0.3, 0.7, -0.4]])
B = torch.tensor([1.0, -0.5, 0.25])


def quadratic(z):
    return z @ A @ z + B @ z


def exact(f):
    """The gradient of E f(z) over all 8 values of z."""
    logits = LOGITS.clone().requires_grad_()
    p = torch.sigmoid(logits)
    total = sum(
        torch.where(torch.tensor(z) == 1, p, 1 - p).prod() * f(torch.tensor(z, dtype=torch.float32))
        for z in product((0, 1), repeat=3)
    )
    return torch.autograd.grad(total, logits)[0]


def estimated(f):
    """The mean of ReinMax's gradient over all 8 samples, each with its probability."""
    p, total = torch.sigmoid(LOGITS), torch.zeros(3)
    for z in product((0, 1), repeat=3):
        want = torch.tensor(z, dtype=torch.float32)
        uniform = torch.where(want == 1, p / 2, (1 + p) / 2)
        logits = LOGITS.clone().requires_grad_()
        drawn = sample(logits, "reinmax", 1.0, uniform)
        assert torch.equal(drawn, want)
        f(drawn).backward()
        total += torch.where(want == 1, p, 1 - p).prod() * logits.grad
    return total


def test_reinmax_is_exact_in_the_mean_for_a_quadratic_loss():
    torch.testing.assert_close(estimated(quadratic), exact(quadratic), rtol=1e-5, atol=1e-6)


def test_reinmax_is_near_for_another_loss():
    def loss(z):
        return torch.exp(0.5 * (z @ B)) + quadratic(z)

    found, want = estimated(loss), exact(loss)
    assert 0 < (found - want).abs().max() < 0.02 * want.abs().max()


@pytest.mark.parametrize(("temperature", "tolerance"), [(0.1, 0.05), (0.4, 0.15)])
def test_gumbel_is_near_for_a_linear_loss(temperature, tolerance, generator):
    draws = 40_000
    logits = LOGITS.repeat(draws).requires_grad_()
    z = sample(logits, "gumbel", temperature, torch.rand(3 * draws, generator=generator))
    (z.view(draws, 3) @ B).sum().backward()
    mean = logits.grad.view(draws, 3).mean(0)
    torch.testing.assert_close(mean, exact(lambda z: B @ z), rtol=tolerance, atol=0)


@pytest.mark.parametrize("estimator", ["reinmax", "gumbel"])
def test_samples_are_zeros_and_ones_with_the_right_frequency(estimator, generator):
    z = sample(LOGITS.repeat(20_000), estimator, 1.0, torch.rand(60_000, generator=generator))
    assert set(z.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(z.view(-1, 3).mean(0), torch.sigmoid(LOGITS), rtol=0, atol=0.015)
