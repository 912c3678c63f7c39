"""Bits by importance, against all plans there are, with formats whose bits are no whole numbers."""

import math
from itertools import product

import pytest

from problems import SPACE, formats, problem
from trimbit.search.methods import importance
from trimbit.search.variables import variables

BITS = {"binaryrow": 1.0, "ternaryrow": 1.6, "int4row": 4.0}


def require_best(found, told, gain):
    """What is allocated is within the bytes, and no plan there has more gain."""

    def nbytes(point):
        return sum(costs[level] for costs, level in zip(found.costs, point, strict=True))

    every = product(range(len(found.formats)), repeat=len(found.layers))
    best = max(gain(point) for point in every if nbytes(point) <= found.room_nbytes)
    point = importance.allocate(found, told)
    assert nbytes(point) <= found.room_nbytes
    assert gain(point) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_gain_is_the_largest_within_the_bytes(share):
    space = SPACE.model_copy(update={"formats": formats("int4row", "binaryrow", "ternaryrow")})
    config = importance.Config(per="unit", share=share)
    found = variables(problem(importance.default_nbytes(problem(0, space=space), config), space=space), "unit")
    assert [p.name for p in found.formats] == ["binaryrow", "ternaryrow", "int4row"]
    told = {layer: 0.1 + 0.37 * at % 1 for at, layer in enumerate(found.layers)}

    def gain(point):
        return sum(told[layer] * math.log2(BITS[found.formats[level].name])
                   for layer, level in zip(found.layers, point, strict=True))  # fmt: skip

    require_best(found, told, gain)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
def test_a_layer_that_is_cut_finer_is_worth_no_more(share):
    space = SPACE.model_copy(update={"formats": formats("int4row", "int2row")})
    config = importance.Config(per="weight", share=share)
    found = variables(problem(importance.default_nbytes(problem(0, space=space), config), space=space), "weight")
    told = {layer: 0.5 + at % 3 for at, layer in enumerate(dict.fromkeys(found.layers))}
    shares = [
        costs[0] / sum(other[0] for name, other in zip(found.layers, found.costs, strict=True) if name == layer)
        for layer, costs in zip(found.layers, found.costs, strict=True)
    ]

    def gain(point):
        return sum(told[name] * share * level for name, share, level in zip(found.layers, shares, point, strict=True))

    require_best(found, told, gain)
