"""The uniform baseline: the largest format that fits, or the best measured of the largest."""

import pytest

from problems import LAYOUT, formats, problem
from trimbit.errors import BudgetError
from trimbit.model.resolved import resolve
from trimbit.search.methods import uniform
from trimbit.search.methods.uniform import Config

MENU = formats("int8row", "int2row", "int4g32", "uint4g32", "int3row")
SIZES = {p.name: problem(0).uniform(p, "").found_by.nbytes for p in MENU}


def chosen(plan):
    names = {run.precision.name for own in plan.weights.values() for run in own}
    assert len(names) == 1
    assert plan.cuts == {}
    assert plan.weights.keys() == LAYOUT.weights.keys()
    return names.pop()


@pytest.mark.parametrize("name", SIZES)
def test_the_largest_that_fits(name):
    plan = uniform.search(problem(SIZES[name]), Config(formats=MENU)).plan
    assert chosen(plan) == name
    assert resolve(plan, LAYOUT).file_nbytes == SIZES[name] == plan.found_by.nbytes
    smaller = max((size for size in SIZES.values() if size < SIZES[name]), default=None)
    if smaller:
        assert SIZES[chosen(uniform.search(problem(SIZES[name] - 1), Config(formats=MENU)).plan)] == smaller


def test_one_byte_below_the_smallest():
    with pytest.raises(BudgetError, match=rf"--budget {SIZES['int2row']}B"):
        uniform.search(problem(SIZES["int2row"] - 1), Config(formats=MENU))


def test_the_default_menu_has_every_integer_format_once():
    assert len({p.name for p in uniform.MENU}) == len(uniform.MENU) == 7 * 4


def test_the_least_damage_of_the_largest_is_taken():
    damage = {"int8row": 0.3, "uint4g32": 0.2, "int4g32": 0.1, "int3row": 0.4, "int2row": 0.0}
    tried = []

    def evaluate(plan):
        tried.append(chosen(plan))
        return damage[tried[-1]]

    asked = problem(SIZES["int8row"], evaluate=evaluate)
    found = uniform.search(asked, Config(formats=MENU, tries=3))
    plan = found.plan
    assert chosen(plan) == "int4g32"
    assert plan.found_by.measured_damage is None  # that is for a plan that was applied
    assert {one.plan.found_by.method: one.estimated_kl for one in found.tried} == {
        "uniform int8row": 0.3, "uniform uint4g32": 0.2, "uniform int4g32": 0.1
    }  # fmt: skip
    assert sorted(tried) == ["int4g32", "int8row", "uint4g32"]
    assert chosen(uniform.search(asked, Config(formats=MENU, tries=5)).plan) == "int2row"
    assert chosen(uniform.search(asked, Config(formats=MENU, tries=1)).plan) == "int8row"
