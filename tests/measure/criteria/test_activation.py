"""Wanda-sp and FLAP on numbers worked out by hand."""

import pytest
import torch

from trimbit.calibrate.moments import Moments
from trimbit.measure.criteria.activation import Config, score

# three tokens of four channels
X = torch.tensor([[1.0, 0.0, 2.0, 1.0], [1.0, 3.0, -2.0, 2.0], [1.0, 0.0, 3.0, 3.0]])
W = torch.tensor([[1.0, -2.0, 0.5, 1.0], [-3.0, 2.0, 0.5, 0.0]])
MOMENTS = Moments(count=3, h=X.T @ X / 3, mean=X.mean(0))
WANDA = [2 * 1, 2 * 3**0.5, 0.5 * (17 / 3) ** 0.5, 0.5 * (14 / 3) ** 0.5]  # mean |W_j| sqrt(E x_j^2)
FLAP = [0.0, 8 * (3 - 1), 0.5 * (17 / 3 - 1), 1 * (14 / 3 - 4)]  # |W_j|^2 Var(x_j); the first channel is constant


@pytest.mark.parametrize(("kind", "expected"), [("wanda_sp", WANDA), ("flap", FLAP)])
def test_by_hand(kind, expected):
    found = score(W, MOMENTS, 1, Config(kind=kind))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "expected"), [("wanda_sp", WANDA), ("flap", FLAP)])
def test_a_group_is_the_sum_of_its_channels(kind, expected):
    found = score(W, MOMENTS, 2, Config(kind=kind))
    pairs = [expected[0] + expected[1], expected[2] + expected[3]]
    torch.testing.assert_close(found, torch.tensor(pairs), atol=1e-5, rtol=1e-5)


def test_flap_is_the_default_and_rounding_below_zero_is_clipped():
    assert Config().kind == "flap"
    constant = Moments(count=3, h=torch.full((2, 2), 1.0), mean=torch.full((2,), 1.0 + 1e-6))
    assert score(torch.ones(1, 2), constant, 1, Config()).tolist() == [0.0, 0.0]
