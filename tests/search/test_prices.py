"""Prices follow the KL downhill, one kind at a time."""

import pytest

from problems import SPACE, problem
from trimbit.search.prices import FEW, STEP, Prices, descend, kinds_of


def bowl(best, asked):
    """A KL that is least at the steps `best`; keeps what it was asked for."""

    def kl(prices):
        found = 1.0 + sum((prices.steps.get(kind, 0) - own) ** 2 for kind, own in best.items())
        asked.append((found, {kind: own for kind, own in prices.steps.items() if own}))
        return found

    return kl


def test_the_least_is_found():
    asked = []
    descend(("mid", "kv", FEW), bowl({"mid": -2, "kv": 0, FEW: 1}, asked), 20)
    assert min(asked, key=lambda one: one[0]) == (1.0, {"mid": -2, FEW: 1})


def test_it_stops_where_nothing_is_better():
    asked = []
    descend(("mid",), bowl({"mid": 0}, asked), 20)
    assert [steps for _, steps in asked] == [{}, {"mid": -1}, {"mid": 1}]


@pytest.mark.parametrize("most", [1, 4])
def test_no_more_is_asked_than_allowed(most):
    asked = []
    descend(("mid", "kv"), bowl({"mid": 9}, asked), most)
    assert len(asked) == most
    assert asked[0] == (82.0, {})


def test_what_has_a_price():
    assert kinds_of(problem(10**6), prune=True) == ("mid", "kv", FEW)
    assert kinds_of(problem(10**6), prune=False) == (FEW,)
    wide = SPACE.model_copy(update={"formats": tuple(one for one in SPACE.formats if one.bits >= 3)})
    assert kinds_of(problem(10**6, space=wide), prune=False) == ()


def test_a_price_is_a_factor():
    prices = Prices().moved("mid", -1).moved("mid", -1).moved(FEW, 1)
    assert prices.of_width("blocks.3.mlp.mid") == pytest.approx(STEP**-2)
    assert prices.of_width("blocks.3.attn.kv") == 1
    assert [prices.of_format(one) for one in SPACE.formats] == [STEP if one.bits < 3 else 1.0 for one in SPACE.formats]
    assert str(prices) == "mid x0.44, below 3 bits x1.5"
    assert str(Prices()) == ""
