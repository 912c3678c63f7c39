"""Points of a box within a limit."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from small_boxes import QUICK, binary, box_of, everything, float_sum, levels, run, seeded, shares
from trimbit.search.solvers import bayes
from trimbit.search.solvers import box as boxes
from trimbit.search.solvers.box import Box


@settings(deadline=None, max_examples=100)
@given(st.lists(levels, min_size=1, max_size=7), shares, st.integers(0, 40), st.integers(0, 9))
def test_random_points_fit_and_are_new_and_as_many_as_there_are(costs, share, count, seed):
    box, rng = box_of(costs, share), random.Random(seed)
    everything_that_fits = everything(box)
    tried = set(rng.sample(everything_that_fits, rng.randint(0, len(everything_that_fits))))
    found = boxes.feasible_points(box, count, seeded(seed), tried)
    assert len(set(found)) == len(found) == min(count, len(everything_that_fits) - len(tried))
    assert set(found) <= set(everything_that_fits) - tried


def test_random_points_leave_no_room_and_differ_where_chance_would_never_fit():
    box, _ = binary(0, levels=60, share=0.02)
    found = boxes.feasible_points(box, 50, seeded(0))
    assert len(set(found)) == 50
    for point in found:
        left = box.room_nbytes - box.nbytes(point)
        raised = [high - low for (low, high), level in zip(box.costs, point, strict=True) if level == 0]
        assert 0 <= left < min(raised)
    assert sum(any(at) for at in zip(*found, strict=True)) > 15  # so many variables are raised in one or another


@settings(deadline=None, max_examples=100)
@given(st.lists(levels, min_size=1, max_size=7), shares, st.integers(1, 40), st.integers(0, 9))
def test_neighbours_fit_and_hold_all_steps_and_swaps(costs, share, near, seed):
    box = box_of(costs, share)
    everything_that_fits = everything(box)
    point = random.Random(seed).choice(everything_that_fits)
    found = boxes.neighbours(box, point, near, seeded(seed))
    assert len(set(found)) == len(found)
    assert set(found) <= set(everything_that_fits) - {point}
    moves = [tuple(b - a for a, b in zip(point, other, strict=True)) for other in everything_that_fits]
    steps = {p for p, move in zip(everything_that_fits, moves, strict=True) if sum(map(abs, move)) == 1}
    swaps = {p for p, move in zip(everything_that_fits, moves, strict=True) if sorted(filter(None, move)) == [-1, 1]}
    assert set(found) >= steps
    if len(point) ** 2 <= near:
        assert set(found) >= swaps


def test_a_large_variable_is_exchanged_for_many_small_ones():
    box = Box(costs=((0, 10), *((0, 1),) * 10), values=((0.0, 1.0),) * 11, room_nbytes=10)
    small, large = (0,) + (1,) * 10, (1,) + (0,) * 10
    assert large in boxes.neighbours(box, small, 50, seeded(0))
    assert small in boxes.neighbours(box, large, 50, seeded(0))


def test_what_is_over_the_limit_is_refused():
    box = Box(costs=((1, 2),), values=((0.0, 1.0),), room_nbytes=1)
    with pytest.raises(AssertionError, match="over the limit"):
        run(bayes.optimise, box, float_sum, QUICK, start=[(1,)])
    with pytest.raises(AssertionError, match="nothing fits"):
        boxes.feasible_points(Box(costs=((2,),), values=((0.0,),), room_nbytes=1), 1, seeded(0))
