"""Pareto sets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimbit.search.solvers import pareto as pareto_sets


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
