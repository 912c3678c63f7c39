"""Bits by importance, against all plans there are, with formats whose bits are no whole numbers."""

import math
from itertools import product

import pytest

from problems import SPACE, formats, problem
from trimbit.search import importance
from trimbit.search.levels import levels

BITS = {"binaryrow": 1.0, "ternaryrow": 1.6, "int4row": 4.0}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_gain_is_the_largest_within_the_bytes(share):
    space = SPACE.model_copy(update={"formats": formats("int4row", "binaryrow", "ternaryrow")})
    config = importance.Config(per="unit", share=share)
    found = levels(problem(importance.default_limit(problem(0, space=space), config), space=space), "unit")
    assert [p.name for p in found.formats] == ["binaryrow", "ternaryrow", "int4row"]
    told = {layer: 0.1 + 0.37 * at % 1 for at, layer in enumerate(found.layers)}

    def gain(point):
        return sum(told[layer] * math.log2(BITS[found.formats[level].name])
                   for layer, level in zip(found.layers, point, strict=True))  # fmt: skip

    def nbytes(point):
        return sum(costs[level] for costs, level in zip(found.costs, point, strict=True))

    every = product(range(3), repeat=len(found.layers))
    best = max(gain(point) for point in every if nbytes(point) <= found.limit)
    point = importance.allocate(found, told)
    assert nbytes(point) <= found.limit
    assert gain(point) == pytest.approx(best, rel=1e-3)
