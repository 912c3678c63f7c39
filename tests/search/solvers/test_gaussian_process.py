"""The surrogate and its proposals."""

import itertools
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small_boxes import QUICK, binary, box_of, everything, levels, seeded, shares
from trimbit.errors import NumericsError, RecipeError
from trimbit.search.solvers import bayes, gaussian_process
from trimbit.search.solvers import box as boxes
from trimbit.search.solvers.box import Box


def test_features_are_scaled():
    box = Box(costs=((1, 2, 3), (5,), (1, 2)), values=((1.0, 2.0, 3.0), (7.0,), (4.0, 4.0)), room_nbytes=99)
    want = torch.tensor([[0, 0, 0], [0.5, 0, 0], [1, 0, 0]], dtype=torch.float64)
    assert torch.equal(box.features([(0, 0, 0), (1, 0, 1), (2, 0, 1)]), want)


@settings(deadline=None, max_examples=20)
@given(st.lists(levels, min_size=1, max_size=7), shares, st.integers(1, 4), st.integers(0, 9))
def test_proposals_fit_and_are_new_and_distinct(costs, share, batch, seed):
    box = box_of(costs, share)
    everything_that_fits = everything(box)
    rng = random.Random(seed)
    points = rng.sample(everything_that_fits, min(len(everything_that_fits), 12))
    values = [rng.choice([0.0, 1.0, rng.random()]) for _ in points]
    found = bayes.propose(box, points, values, batch, seeded(seed), QUICK)
    assert len(set(found)) == len(found) == min(batch, len(everything_that_fits) - len(points))
    assert set(found) <= set(everything_that_fits) - set(points)


def test_a_batch_begins_with_the_proposal_for_one_and_takes_the_pending_into_account():
    box, damage = binary(1)
    points = boxes.feasible_points(box, 12, seeded(0))
    values = [damage(point) for point in points]
    before = torch.random.get_rng_state()
    (one,) = bayes.propose(box, points, values, 1, seeded(3), QUICK)
    batch = bayes.propose(box, points, values, 4, seeded(3), QUICK)
    assert batch[0] == one
    assert len(set(batch)) == 4
    assert batch == bayes.propose(box, points, values, 4, seeded(3), QUICK)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_surrogate_predicts_what_it_has_not_seen():
    """Interpolates an additive damage of two variables with nine levels much better than its mean does."""
    x = torch.tensor(list(itertools.product(range(9), repeat=2)), dtype=torch.float64) / 8
    y = (x[:, 0] - 0.3) ** 2 + 0.5 * (2 * x[:, 1]).sin()
    y = (y - y.mean()) / y.std()
    seen = torch.randperm(81, generator=seeded(0)) < 25
    with gaussian_process._botorch(0):
        model = gaussian_process._surrogate(x[seen], y[seen], 50)
        with torch.no_grad():
            error = model.posterior(x[~seen]).mean[:, 0] - y[~seen]
    assert error.square().mean() < 0.01


def test_a_pending_point_is_not_worth_a_second_evaluation():
    """Both ends promise the same; where one is pending, the other one does."""
    x = torch.tensor([[0.3], [0.5], [0.7]], dtype=torch.float64)
    ends = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)
    with gaussian_process._botorch(0):
        model = gaussian_process._surrogate(x, torch.tensor([0.7, -1.4, 0.7], dtype=torch.float64), 50)
        alone, beside = (gaussian_process._acquisition(model, 0.7, ends[:n, 0], 256, 0)(ends) for n in (0, 1))
    alone, beside = alone.tolist(), beside.tolist()
    assert alone[0] == pytest.approx(alone[1], abs=1e-3)
    assert beside[1] > beside[0] + 0.1


@pytest.mark.parametrize("constant", [0.1, 1e6])
def test_results_that_are_all_alike(constant):
    box, _ = binary(2)
    points = boxes.feasible_points(box, 6, seeded(0))
    assert len(bayes.propose(box, points, [constant] * 6, 2, seeded(0), QUICK)) == 2
    assert len(bayes.propose(box, points[:1], [constant], 1, seeded(0), QUICK)) == 1


def test_a_fit_that_fails_is_an_error(monkeypatch):
    box, _ = binary(2)
    points = boxes.feasible_points(box, 6, seeded(0))

    def refuse(*_args, **_kwargs):
        from botorch.exceptions import ModelFittingError

        raise ModelFittingError("all attempts failed")

    gaussian_process.require_botorch()
    monkeypatch.setattr("botorch.fit.fit_gpytorch_mll", refuse)
    with pytest.raises(NumericsError, match="cannot be fitted to its results: all attempts failed"):
        bayes.propose(box, points, [float(i) for i in range(6)], 1, seeded(0), QUICK)


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "botorch", None)
    with pytest.raises(RecipeError, match=r"search bayes needs botorch: pip install 'trimbit\[bo\]'"):
        gaussian_process.require_botorch()
