"""Bayesian optimisation: always within the limit, never twice, the same after an interruption, better than chance."""

import pytest

from small_boxes import QUICK, binary, everything, float_sum, run, seeded
from trimbit.errors import NumericsError
from trimbit.search.solvers import bayes
from trimbit.search.solvers import box as boxes
from trimbit.search.solvers.bayes import Config
from trimbit.search.solvers.box import Box


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


@pytest.mark.slow
def test_finds_the_least_of_all():
    """A space of hundreds of points, of which a few dozen are tried."""
    box, damage = binary(4, levels=10, share=0.4)
    everything_that_fits = everything(box)
    assert len(everything_that_fits) > 200
    done = run(bayes.optimise, box, damage, QUICK.model_copy(update={"trials": 36}))
    assert min(value for _, value in done.found) == min(map(damage, everything_that_fits))


@pytest.mark.parametrize("method", [bayes.optimise, bayes.random_search])
@pytest.mark.parametrize("batch", [1, 4])
def test_tries_all_of_a_tiny_space_and_stops(method, batch):
    box = Box(costs=((1, 2, 3), (1, 2), (2, 4)), values=((0.0, 1.0, 2.0), (0.0, 1.0), (0.0, 1.0)), room_nbytes=7)
    config = QUICK.model_copy(update={"initial": 3, "batch": batch})
    done = run(method, box, float_sum, config)
    assert sorted(point for point, _ in done.found) == sorted(everything(box))
    assert len(done.evaluated) == len(everything(box)) < config.trials


@pytest.mark.slow
@pytest.mark.parametrize("method", [bayes.optimise, bayes.random_search])
@pytest.mark.parametrize("batch", [1, 3])
def test_goes_on_as_if_never_interrupted(method, batch):
    box, damage = binary(5, levels=8)
    config = QUICK.model_copy(update={"trials": 9, "initial": 3, "batch": batch})
    start = boxes.feasible_points(box, 2, seeded(9))
    whole = run(method, box, damage, config, start=start)
    assert whole.record == dict(whole.found)
    assert [point for point, _ in whole.found][:2] == start
    assert [value for _, value in whole.found] == [damage(point) for point, _ in whole.found]
    assert whole.progress[0] == (1, 9)
    assert whole.progress[-1] == (9, 9)
    for stop in range(9):
        killed = run(method, box, damage, config, start=start, stop=stop)
        assert killed.found is None
        assert len(killed.record) == stop
        rest = run(method, box, damage, config, start=start, known=killed.record)
        assert rest.found == whole.found
        assert set(rest.evaluated) == {point for point, _ in whole.found if point not in killed.record}
    again = run(method, box, damage, config, start=start, known=whole.record)
    assert (again.found, again.evaluated) == (whole.found, [])
    fewer = run(method, box, damage, config.model_copy(update={"trials": 6}), start=start, known=whole.record)
    assert fewer.found == whole.found[:6]
    assert run(method, box, damage, config, start=start, seed=1).found != whole.found


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damage_that_is_not_finite_is_an_error(bad):
    box, damage = binary(0, levels=6)
    third = [point for point, _ in run(bayes.random_search, box, damage, Config(trials=5)).found][2]

    def evaluate(points):
        return [(point, bad if point == third else damage(point)) for point in points]

    with pytest.raises(NumericsError) as caught:
        bayes.optimise(box, [], evaluate, Config(batch=4), 0, lambda *_: None)
    assert str(third) in str(caught.value)


def test_smaller_points_fit_smaller_limits():
    box, damage = binary(3, levels=12)
    config = Config(smaller=3, pool=16, near=8, steps=5)
    points = boxes.feasible_points(box, 8, seeded(0))
    tried = dict(zip(points, map(damage, points), strict=True))
    found = bayes.smaller(box, tried, config, 0)
    least = box.nbytes(box.lowest)
    limits = [least + (box.room_nbytes - least) * part // 3 for part in range(3)]
    assert len(found) == len(set(found)) == 3
    assert not tried.keys() & found
    assert all(box.nbytes(point) <= limit for point, limit in zip(found, limits, strict=True))
    assert found[0] == box.lowest
    assert found == bayes.smaller(box, tried, config, 0)
