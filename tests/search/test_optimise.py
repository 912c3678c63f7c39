"""Bayesian optimisation: always within the limit, never twice, the same after an interruption, better than chance."""

import itertools
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimbit.errors import NumericsError, RecipeError
from trimbit.search.solvers import bayes, gaussian_process
from trimbit.search.solvers import box as boxes
from trimbit.search.solvers import pareto as pareto_sets
from trimbit.search.solvers.bayes import Config
from trimbit.search.solvers.box import Box

QUICK = Config(pool=32, near=16, steps=15, samples=32)


levels = st.lists(st.integers(0, 1000), min_size=1, max_size=4, unique=True).map(sorted)
shares = st.integers(0, 100)


def box_of(costs, share):
    """A space of which anything from one point to all of them fits."""
    least, most = sum(own[0] for own in costs), sum(own[-1] for own in costs)
    values = tuple(tuple(float(at) for at in range(len(own))) for own in costs)
    return Box(costs=tuple(map(tuple, costs)), values=values, limit=least + (most - least) * share // 100)


def everything(box):
    """All points that fit, counted without the code under test."""
    points = itertools.product(*(range(len(own)) for own in box.costs))
    return [at for at in points if sum(own[i] for own, i in zip(box.costs, at, strict=True)) <= box.limit]


def float_sum(point):
    return float(sum(point))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def binary(seed, levels=20, share=0.3):
    """A space of two formats for each of many weights, and a damage with a term for each and for some pairs."""
    rng = random.Random(seed)
    sizes = [rng.choice([100, 300, 1000]) for _ in range(levels)]
    costs = tuple((4 * size, 8 * size) for size in sizes)
    box = Box(costs=costs, values=((2.0, 3.0),) * levels, limit=int((4 + 4 * share) * sum(sizes)))
    own = [rng.expovariate(1) * size**0.5 for size in sizes]
    pairs = {pair: rng.gauss(0, 3) for pair in itertools.combinations(range(levels), 2) if rng.random() < 0.2}

    def damage(point):
        error = [(1.0, 0.25)[level] for level in point]
        both = sum(w * error[i] * error[j] for (i, j), w in pairs.items())
        return sum(w * e for w, e in zip(own, error, strict=True)) + both

    return box, damage


def run(method, box, damage, config, *, start=(), known=None, seed=0, stop=None):
    """All that a run did; `stop` kills it after so many new results."""
    done = SimpleNamespace(evaluated=[], record={}, numbers={}, progress=[])

    def evaluate(points):
        first = not done.evaluated and len(known or {}) < config.initial
        assert 0 < len(points) <= (config.initial if first else config.batch)
        done.evaluated += points
        return [(point, damage(point)) for point in reversed(points)]  # as processes may be done with them

    def record(number, point, value):
        if len(done.record) == stop:
            raise KeyboardInterrupt
        done.record[point] = value
        done.numbers[point] = number

    try:
        done.found = method(
            box, start, evaluate, known or {}, config, seed, lambda *at: done.progress.append(at), record
        )
    except KeyboardInterrupt:
        done.found = None
    return done


# --- points ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.lists(levels, min_size=1, max_size=7), shares, st.integers(0, 40), st.integers(0, 9))
def test_random_points_fit_and_are_new_and_as_many_as_there_are(costs, share, count, seed):
    box, rng = box_of(costs, share), random.Random(seed)
    uniform_within_budget = everything(box)
    tried = set(rng.sample(uniform_within_budget, rng.randint(0, len(uniform_within_budget))))
    found = boxes.feasible_points(box, count, seeded(seed), tried)
    assert len(set(found)) == len(found) == min(count, len(uniform_within_budget) - len(tried))
    assert set(found) <= set(uniform_within_budget) - tried


def test_random_points_leave_no_room_and_differ_where_chance_would_never_fit():
    box, _ = binary(0, levels=60, share=0.02)
    found = boxes.feasible_points(box, 50, seeded(0))
    assert len(set(found)) == 50
    for point in found:
        left = box.limit - box.nbytes(point)
        raised = [high - low for (low, high), level in zip(box.costs, point, strict=True) if level == 0]
        assert 0 <= left < min(raised)
    assert sum(any(at) for at in zip(*found, strict=True)) > 15  # so many variables are raised in one or another


@settings(deadline=None, max_examples=100)
@given(st.lists(levels, min_size=1, max_size=7), shares, st.integers(1, 40), st.integers(0, 9))
def test_neighbours_fit_and_hold_all_steps_and_swaps(costs, share, near, seed):
    box = box_of(costs, share)
    uniform_within_budget = everything(box)
    point = random.Random(seed).choice(uniform_within_budget)
    found = boxes.neighbours(box, point, near, seeded(seed))
    assert len(set(found)) == len(found)
    assert set(found) <= set(uniform_within_budget) - {point}
    moves = [tuple(b - a for a, b in zip(point, other, strict=True)) for other in uniform_within_budget]
    steps = {p for p, move in zip(uniform_within_budget, moves, strict=True) if sum(map(abs, move)) == 1}
    swaps = {p for p, move in zip(uniform_within_budget, moves, strict=True) if sorted(filter(None, move)) == [-1, 1]}
    assert set(found) >= steps
    if len(point) ** 2 <= near:
        assert set(found) >= swaps


def test_a_large_variable_is_exchanged_for_many_small_ones():
    box = Box(costs=((0, 10), *((0, 1),) * 10), values=((0.0, 1.0),) * 11, limit=10)
    small, large = (0,) + (1,) * 10, (1,) + (0,) * 10
    assert large in boxes.neighbours(box, small, 50, seeded(0))
    assert small in boxes.neighbours(box, large, 50, seeded(0))


def test_features_are_scaled():
    box = Box(costs=((1, 2, 3), (5,), (1, 2)), values=((1.0, 2.0, 3.0), (7.0,), (4.0, 4.0)), limit=99)
    want = torch.tensor([[0, 0, 0], [0.5, 0, 0], [1, 0, 0]], dtype=torch.float64)
    assert torch.equal(box.features([(0, 0, 0), (1, 0, 1), (2, 0, 1)]), want)


# --- proposals -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.lists(levels, min_size=1, max_size=7), shares, st.integers(1, 4), st.integers(0, 9))
def test_proposals_fit_and_are_new_and_distinct(costs, share, batch, seed):
    box = box_of(costs, share)
    uniform_within_budget = everything(box)
    rng = random.Random(seed)
    points = rng.sample(uniform_within_budget, min(len(uniform_within_budget), 12))
    values = [rng.choice([0.0, 1.0, rng.random()]) for _ in points]
    found = bayes.propose(box, points, values, batch, seeded(seed), QUICK)
    assert len(set(found)) == len(found) == min(batch, len(uniform_within_budget) - len(points))
    assert set(found) <= set(uniform_within_budget) - set(points)


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


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_better_than_chance():
    """The same ten first points, then forty trials in all: over a few seeds less damage, and less on nearly each."""
    config = Config(steps=20, near=32, pool=64)
    gains = []
    for seed in range(3):
        box, damage = binary(seed)
        asked, drawn = (
            [value for _, value in run(method, box, damage, config, seed=seed).found]
            for method in (bayes.optimise, bayes.random_search)
        )
        assert len(asked) == len(drawn) == 40
        assert asked[:10] == drawn[:10]
        assert min(asked) < min(asked[:10])
        gains.append((min(drawn) - min(asked)) / (min(drawn[:10]) - min(drawn) + 1))
    assert sum(gains) > 0.5
    assert sorted(gains)[1] > 0


def test_finds_the_least_of_all():
    """A space of hundreds of points, of which a few dozen are tried."""
    box, damage = binary(4, levels=10, share=0.4)
    uniform_within_budget = everything(box)
    assert len(uniform_within_budget) > 200
    done = run(bayes.optimise, box, damage, QUICK.model_copy(update={"trials": 36}))
    assert min(value for _, value in done.found) == min(map(damage, uniform_within_budget))


@pytest.mark.parametrize("method", [bayes.optimise, bayes.random_search])
@pytest.mark.parametrize("batch", [1, 4])
def test_tries_all_of_a_tiny_space_and_stops(method, batch):
    box = Box(costs=((1, 2, 3), (1, 2), (2, 4)), values=((0.0, 1.0, 2.0), (0.0, 1.0), (0.0, 1.0)), limit=7)
    config = QUICK.model_copy(update={"initial": 3, "batch": batch})
    done = run(method, box, float_sum, config)
    assert sorted(point for point, _ in done.found) == sorted(everything(box))
    assert len(done.evaluated) == len(everything(box)) < config.trials


@pytest.mark.parametrize("method", [bayes.optimise, bayes.random_search])
@pytest.mark.parametrize("batch", [1, 3])
def test_goes_on_as_if_never_interrupted(method, batch):
    box, damage = binary(5, levels=8)
    config = QUICK.model_copy(update={"trials": 9, "initial": 3, "batch": batch})
    start = boxes.feasible_points(box, 2, seeded(9))
    whole = run(method, box, damage, config, start=start)
    assert whole.record == dict(whole.found)
    assert sorted(whole.record, key=whole.numbers.get) == [point for point, _ in whole.found]
    assert sorted(whole.numbers.values()) == list(range(9))
    assert [point for point, _ in whole.found][:2] == start
    assert [value for _, value in whole.found] == [damage(point) for point, _ in whole.found]
    assert whole.progress[0] == (0, 9)
    assert whole.progress[-1] == (9, 9)
    for stop in range(9):
        killed = run(method, box, damage, config, start=start, stop=stop)
        assert killed.found is None
        assert len(killed.record) == stop
        known = {point: killed.record[point] for point in sorted(killed.record, key=killed.numbers.get)}
        rest = run(method, box, damage, config, start=start, known=known)
        assert rest.found == whole.found
        assert rest.evaluated == [point for point, _ in whole.found if point not in known]
        assert killed.numbers | rest.numbers == whole.numbers
    whole.record = dict(whole.found)
    again = run(method, box, damage, config, start=start, known=whole.record)
    assert (again.found, again.evaluated) == (whole.found, [])
    fewer = run(method, box, damage, config.model_copy(update={"trials": 6}), start=start, known=whole.record)
    assert fewer.found == whole.found[:6]
    assert run(method, box, damage, config, start=start, seed=1).found != whole.found


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damage_that_is_not_finite_is_an_error(bad):
    box, damage = binary(0, levels=6)
    third = [point for point, _ in run(bayes.random_search, box, damage, Config(trials=5)).found][2]
    done = {}

    def evaluate(points):
        return [(point, bad if point == third else damage(point)) for point in points]

    def record(_, point, value):
        done[point] = value

    with pytest.raises(NumericsError) as caught:
        bayes.optimise(box, [], evaluate, {}, Config(batch=4), 0, lambda *_: None, record)
    assert str(third) in str(caught.value)
    assert len(done) == 2


def test_what_is_over_the_limit_is_refused():
    box = Box(costs=((1, 2),), values=((0.0, 1.0),), limit=1)
    for start, known in (([(1,)], {}), ([], {(1,): 0.0})):
        with pytest.raises(AssertionError, match="over the limit"):
            run(bayes.optimise, box, float_sum, QUICK, start=start, known=known)
    with pytest.raises(AssertionError, match="nothing fits"):
        boxes.feasible_points(Box(costs=((2,),), values=((0.0,),), limit=1), 1, seeded(0))


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=30))
def test_pareto_keeps_exactly_the_unbeaten(pairs):
    front = pareto_sets.pareto([(float(a), float(b)) for a, b in pairs])
    assert front == sorted(set(front))
    kept = [pairs[at] for at in front]
    for at, (a, b) in enumerate(pairs):
        beaten = any((c < a and d <= b) or (c <= a and d < b) for c, d in pairs)
        assert (at in front) != beaten
        assert any(c <= a and d <= b for c, d in kept)


@pytest.mark.parametrize(
    ("sizes", "values", "found"),
    [
        ([20480, 20479], [0.30, 0.31], [0]),
        ([20479, 20480], [0.31, 0.30], [1]),
        ([10_000, 20_000, 30_000, 20_008], [0.5, 0.3, 0.4, 0.31], [0, 1]),
        ([10_000, 13_000, 16_000, 30_000], [0.5, 0.4, 0.3, 0.2], [1, 2, 3]),
        ([10_000], [0.5], [0]),
    ],
)
def test_a_front_of_files_does_not_trade_for_a_few_bytes(sizes, values, found):
    assert pareto_sets.front(sizes, values) == found


def test_smaller_points_fit_smaller_limits():
    box, damage = binary(3, levels=12)
    config = Config(smaller=3, pool=16, near=8, steps=5)
    points = boxes.feasible_points(box, 8, seeded(0))
    tried = dict(zip(points, map(damage, points), strict=True))
    found = bayes.smaller(box, tried, config, 0)
    least = box.nbytes(box.lowest)
    limits = [least + (box.limit - least) * part // 3 for part in range(3)]
    assert len(found) == len(set(found)) == 3
    assert not tried.keys() & found
    assert all(box.nbytes(point) <= limit for point, limit in zip(found, limits, strict=True))
    assert found[0] == box.lowest
    assert found == bayes.smaller(box, tried, config, 0)
