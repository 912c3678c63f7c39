"""The solver: exact on small instances."""

import itertools
import os
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimbit.errors import NumericsError
from trimbit.search.methods.knapsack import Config
from trimbit.search.solvers import knapsack as solver

EXACT = Config(gap=0)


items = st.tuples(st.integers(0, 5000), st.integers(0, 1000).map(lambda n: n / 250))


instances = st.lists(st.lists(items, min_size=1, max_size=4), min_size=1, max_size=6)


def brute_force(groups, limit):
    """The least damage of all combinations that fit; None if none does."""
    sums = [(sum(n for n, _ in one), sum(d for _, d in one)) for one in itertools.product(*groups)]
    return min((damage for nbytes, damage in sums if nbytes <= limit), default=None)


def total(groups, picked):
    chosen = [group[at] for group, at in zip(groups, picked, strict=True)]
    return sum(n for n, _ in chosen), sum(d for _, d in chosen)


@settings(deadline=None, max_examples=150)
@given(instances, st.data())
def test_equals_brute_force(groups, data):
    most = sum(max(n for n, _ in group) for group in groups)
    limit = data.draw(st.integers(0, most + 100))
    solved, best = solver.knapsack(groups, limit, EXACT), brute_force(groups, limit)
    assert (solved is None) == (best is None)
    if solved is not None:
        assert solved.gap in (None, pytest.approx(0, abs=1e-6))
        nbytes, damage = total(groups, solved.picked)
        assert nbytes <= limit
        assert damage == pytest.approx(best, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(instances, st.data())
def test_a_limit_that_is_met_to_the_byte(groups, data):
    chosen = [data.draw(st.sampled_from(group)) for group in groups]
    limit = sum(n for n, _ in chosen)
    solved = solver.knapsack(groups, limit, EXACT)
    assert solved is not None
    assert total(groups, solved.picked)[1] <= sum(d for _, d in chosen) + 1e-6


def test_impossible_is_none():
    assert solver.knapsack([[(10, 0.0), (7, 1.0)], [(5, 0.0)]], 11, EXACT) is None
    assert solver.knapsack([[(10, 0.0), (7, 1.0)], [(5, 0.0)]], 12, EXACT).picked == [1, 0]
    assert solver.knapsack([[(10, 0.0), (7, 1.0)], [(5, 0.0)]], 15, EXACT).picked == [0, 0]


def test_negative_damage_is_taken():
    """Measured damage may be below zero by noise."""
    assert solver.knapsack([[(1, 0.0), (9, -0.5)], [(1, 0.2), (9, 0.1)]], 10, EXACT).picked == [1, 0]


def test_damage_never_rises_with_the_budget():
    rng = random.Random(0)
    groups = [[(rng.randrange(10**6), rng.random()) for _ in range(5)] for _ in range(8)]
    least = sum(min(n for n, _ in group) for group in groups)
    limits = range(least, 6 * 10**6, 250_000)
    damages = [total(groups, solver.knapsack(groups, limit, EXACT).picked)[1] for limit in limits]
    assert len(set(damages)) > 3
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(damages))


def test_the_gap_is_what_the_solver_has_proven(monkeypatch):
    """HiGHS proves small instances; stopped early, it says how far it came."""
    real = solver.milp

    def early(*args, **kwargs):
        result = real(*args, **kwargs)
        result.status, result.mip_gap = 1, 0.125
        return result

    groups = [[(10, 0.0), (7, 1.0)], [(5, 0.0)]]
    assert solver.knapsack(groups, 15, EXACT) == ([0, 0], 0.0)
    monkeypatch.setattr(solver, "milp", early)
    assert solver.knapsack(groups, 15, EXACT) == ([0, 0], 0.125)


def test_a_solver_that_stops_with_nothing_is_an_error(monkeypatch):
    """And not a budget that nothing fits."""
    stopped = SimpleNamespace(status=1, x=None, message="Node limit reached")
    monkeypatch.setattr(solver, "milp", lambda *_, **__: stopped)
    with pytest.raises(NumericsError, match=r"stopped without a plan \(Node limit reached\); allow more nodes"):
        solver.knapsack([[(10, 0.0), (7, 1.0)], [(5, 0.0)]], 20, EXACT)


def test_nothing_reaches_stdout(capfd):
    rng = random.Random(1)
    groups = [[(rng.randrange(10**5), rng.random()) for _ in range(8)] for _ in range(60)]
    assert solver.knapsack(groups, 60 * 40_000, Config(nodes=1)) is not None
    with solver._silenced_stdout():
        os.write(1, b"from the solver")
    assert capfd.readouterr().out == ""
    os.write(1, b"after it")
    assert capfd.readouterr().out == "after it"
