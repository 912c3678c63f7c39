"""Bits by importance, against all plans there are, with formats whose bits are no whole numbers."""

import math
from functools import reduce

import numpy as np
import pytest

from problems import SPACE, formats, problem
from trimbit.search.methods import importance
from trimbit.search.variables import variables

BITS = {"binaryrow": 1.0, "ternaryrow": 1.6, "int4row": 4.0}


def require_best(found, told, gains):
    """What is allocated is within the bytes, and no plan there has more gain; `gains` are of each layer's levels."""

    def total(of_levels, point):
        return sum(each[level] for each, level in zip(of_levels, point, strict=True))

    every_nbytes, every_gain = (reduce(np.add.outer, map(np.asarray, of_levels)) for of_levels in (found.costs, gains))
    point = importance.allocate(found, told).picked
    assert total(found.costs, point) <= found.room_nbytes
    assert total(gains, point) == pytest.approx(every_gain[every_nbytes <= found.room_nbytes].max(), rel=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_gain_is_the_largest_within_the_bytes(share):
    space = SPACE.model_copy(update={"formats": formats("int4row", "binaryrow", "ternaryrow")})
    config = importance.Config(per="unit", share=share)
    found = variables(problem(importance.default_nbytes(problem(0, space=space), config), space=space), "unit")
    assert [p.name for p in found.formats] == ["binaryrow", "ternaryrow", "int4row"]
    told = {layer: 0.1 + 0.37 * at % 1 for at, layer in enumerate(found.layers)}
    require_best(
        found, told, [[told[layer] * math.log2(BITS[p.name]) for p in found.formats] for layer in found.layers]
    )


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
    require_best(found, told, [[0.0, told[name] * share] for name, share in zip(found.layers, shares, strict=True)])
