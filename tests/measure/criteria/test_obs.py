"""Greedy elimination against a naive one that inverts what remains of H at each step, and against least squares."""

import pytest
import torch

from trimbit.calibrate.moments import Moments
from trimbit.errors import NumericsError
from trimbit.measure.criteria.obs import Config, score


def correlated(channels, tokens=400, seed=0):
    """Inputs whose channels are mixtures of each other, with a mean; and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator) + torch.eye(channels)
    x = torch.randn(tokens, channels, generator=generator) @ mix + torch.randn(channels, generator=generator)
    w = torch.randn(7, channels, generator=generator)
    return x.double(), w


def moments(x):
    return Moments(count=len(x), h=(x.T @ x / len(x)).float(), mean=x.mean(0).float())


def damped(found, damping):
    h = found.h.double() - found.mean.double().outer(found.mean.double())
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def refitted(w, h, keep):
    """The weight on the kept channels that makes up best for the rest, and what is lost."""
    new = torch.linalg.solve(h[keep][:, keep], h[keep] @ w.T).T
    full = torch.zeros_like(w)
    full[:, keep] = new
    return full, float(((w - full) @ h @ (w - full).T).trace())


def naive(w, h, size):
    """The order in which members leave, each time the one whose removal and refit add least to the loss."""
    left, order, current = list(range(w.shape[1] // size)), [], w.double()
    while left:
        losses = {}
        for member in left:
            keep = [c for m in left if m != member for c in range(m * size, (m + 1) * size)]
            losses[member] = refitted(current, h, torch.tensor(keep, dtype=torch.long))
        first = min(losses, key=lambda member: losses[member][1])
        current = losses[first][0]
        order.append(first)
        left.remove(first)
    return order


@pytest.mark.parametrize(("channels", "size"), [(10, 1), (12, 3), (8, 4), (6, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_naive_elimination(channels, size, seed):
    x, w = correlated(channels, seed=seed)
    found = moments(x)
    scores = score(w, found, size, Config(rounds=channels))
    assert scores.argsort().tolist() == naive(w, damped(found, 0.01), size)
    assert sorted(scores.tolist()) == list(range(channels // size))


def test_the_first_to_leave_costs_least_after_least_squares():
    """Against data, not H: fit the output again, with an intercept, on the channels without each one."""
    x, w = correlated(9, seed=3)
    scores = score(w, moments(x), 1, Config(damping=1e-9, rounds=9))
    y, costs = x @ w.double().T, []
    for channel in range(9):
        kept = torch.cat([x[:, [c for c in range(9) if c != channel]], torch.ones(len(x), 1).double()], 1)
        costs.append(float((y - kept @ torch.linalg.lstsq(kept, y).solution).square().sum()))
    assert int(scores.argmin()) == int(torch.tensor(costs).argmin())


def test_elimination_sees_what_one_shot_costs_do_not():
    """Two channels that are copies: each alone is free to go, but only one of them."""
    x, w = correlated(6, seed=5)
    x[:, 1] = x[:, 0] + 1e-3 * x[:, 1]
    w[:, :2] *= 10
    order = score(w, moments(x), 1, Config(damping=1e-6, rounds=6)).argsort().tolist()
    assert order[0] in {0, 1}
    assert order[5] in {0, 1}


def test_rounds_take_the_cheapest_together():
    x, w = correlated(10, seed=2)
    found = moments(x)
    h = damped(found, 0.01)
    costs = w.double().square().sum(0) / torch.linalg.inv(h).diagonal()
    one_round = score(w, found, 1, Config(rounds=1))
    assert one_round.argsort().tolist() == costs.argsort().tolist()
    two = score(w, found, 1, Config(rounds=2)).argsort().tolist()
    assert set(two[:5]) == set(costs.argsort()[:5].tolist())
    remaining = torch.tensor(sorted(two[5:]))
    again, _ = refitted(w.double(), h, remaining)
    inverse = torch.linalg.inv(h[remaining][:, remaining])
    later = again[:, remaining].square().sum(0) / inverse.diagonal()
    assert two[5:] == remaining[later.argsort()].tolist()


def test_not_positive_definite_says_a_damping():
    h = torch.diag(torch.tensor([1.0, 1.0, -0.5]))
    with pytest.raises(NumericsError, match="a damping of"):
        score(torch.ones(2, 3), Moments(count=3, h=h, mean=torch.zeros(3)), 1, Config())
