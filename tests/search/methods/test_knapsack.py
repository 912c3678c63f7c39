"""The knapsack: exact on small instances, within the budget always, and never worse than a uniform plan."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from problems import LAYOUT, REPORTED, SPACE, additive, formats, measurements, of_width, problem
from trimbit.errors import BudgetError
from trimbit.model.layout import header_bound
from trimbit.model.resolved import resolve
from trimbit.search.methods import knapsack
from trimbit.search.methods.knapsack import Choice, Config
from trimbit.search.prices import Prices
from trimbit.search.problem import NO_CHOICE, Problem

SMALLEST = problem(0).smallest().found_by.nbytes


LARGEST = problem(0).plan({}, {site: formats("uint8row")[0] for site in measurements().background.formats}, "largest")


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=30))
def test_pareto_keeps_exactly_the_non_dominated(pairs):
    unit = LAYOUT.units["embed"]
    front = knapsack.pareto([Choice(unit, None, (), nbytes, 0.0, float(cost)) for nbytes, cost in pairs])
    best = {
        one for one in pairs if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in pairs)
    }
    assert [(c.nbytes, c.cost) for c in front] == sorted(best)


@settings(deadline=None, max_examples=12)
@given(st.integers(SMALLEST, LARGEST.found_by.nbytes + 5000), st.sampled_from([0.0, 1.0, 30.0]))
def test_a_plan_is_never_over_the_budget(limit, cost_of_width):
    found = measurements(width_damage=lambda dim, width: cost_of_width * of_width(dim, width))
    plan = knapsack.search(problem(limit, measurements=found), Config(plans=1)).plan
    resolve(plan, LAYOUT)
    assert resolve(plan, LAYOUT).file_nbytes == plan.found_by.nbytes <= limit


def test_sub_blocks_are_dropped_and_cut_where_that_is_cheapest():
    """Width costs nothing: the whole of every sub-block goes. Width costs everything: nothing does."""
    free = measurements(width_damage=lambda _dim, _width: 0.0)
    plan = knapsack.search(problem(LARGEST.found_by.nbytes, measurements=free), Config(no_pruning=False)).plan
    assert plan.cuts == {unit.dim: () for unit in LAYOUT.units.values() if unit.dim}
    dear = measurements(width_damage=lambda dim, width: 100 * of_width(dim, width))
    plan = knapsack.search(problem(LARGEST.found_by.nbytes, measurements=dear), Config()).plan
    assert plan.cuts == {}
    between = knapsack.search(problem((SMALLEST + LARGEST.found_by.nbytes) // 3), Config()).plan
    widths = {len(keep) for keep in between.cuts.values()}
    assert widths & {1, 2, 32, 40, 48}, between.cuts
    assert set(between.biases) == {LAYOUT.unit_of_dim(dim).out_weight for dim, keep in between.cuts.items() if keep}


def test_keeps_the_best_ranked():
    asked = problem(10**6)
    dim = "blocks.1.mlp.mid"
    ranking = tuple(reversed(range(80)))
    sites = measurements().background.formats
    ranked = Problem(**{**vars(asked), "rankings": {**asked.rankings, dim: ranking}})
    assert ranked.plan({dim: 32}, sites, "by hand").cuts == {dim: tuple(range(48, 80))}


@pytest.mark.parametrize("share", [0.4])
def test_predicted_damage_is_the_least_of_all(share):
    """On an additive problem the prediction is exact, and no plan made at random does better."""
    limit = int(SMALLEST + share * (LARGEST.found_by.nbytes - SMALLEST))
    plan = knapsack.search(problem(limit), Config(gap=0, plans=1)).plan
    assert plan.found_by.predicted_damage == pytest.approx(additive(plan), rel=1e-6)
    rng, widths = random.Random(0), {"attn": (3, 2, 1, 0), "mlp": (80, 32, 0)}
    beaten = 0
    for _ in range(300):
        pruned = rng.random()
        cut = {u.dim: rng.choice(widths[u.name[-4:].strip(".")]) for u in LAYOUT.units.values() if u.dim}
        cut = {dim: width for dim, width in cut.items() if rng.random() < pruned}
        menu = {site: rng.choice(SPACE.formats if "." in site else SPACE.embedding_formats) for site in sites()}
        other = problem(limit).plan(cut, menu, "random")
        if other.found_by.nbytes <= limit - 2000:  # the search reckons with the longest header
            beaten += 1
            assert plan.found_by.predicted_damage <= additive(other) + 1e-9
    assert beaten > 5


def sites():
    return measurements().background.formats


@pytest.mark.parametrize("name", ["uint2g32", "int4g32", "uint8row"])
def test_at_least_as_good_as_uniform(name):
    """Given room for the longest header, a uniform plan of the space is one that the knapsack could choose."""
    same = problem(0).uniform(formats(name)[0], "uniform")
    asked = problem(same.found_by.nbytes + header_bound(LAYOUT), trial=additive)
    plan = knapsack.search(asked, Config()).plan
    assert plan.found_by.measured_damage == pytest.approx(additive(plan) + REPORTED)
    assert additive(plan) <= additive(same)


def test_same_input_same_plan():
    limit = (SMALLEST + LARGEST.found_by.nbytes) // 2
    first, second = (
        knapsack.search(problem(limit, evaluate=additive, trial=additive), Config()).plan for _ in range(2)
    )
    assert first == second


def test_the_smallest_budget_to_the_byte():
    plan = knapsack.search(problem(SMALLEST), Config()).plan
    assert resolve(plan, LAYOUT).file_nbytes == SMALLEST
    assert plan.found_by.notes == (NO_CHOICE.format("the smallest plan"),)
    with pytest.raises(BudgetError, match=rf"--budget {SMALLEST}B"):
        knapsack.search(problem(SMALLEST - 1), Config())


def test_formats_measured_at_a_cut_width_scale_with_the_width():
    """A background that keeps 32 of 80 channels measured 32/80 of a format's damage: choices are the same."""
    cut = {"blocks.0.mlp.mid": 32, "blocks.2.attn.kv": 1, "blocks.1.mlp.mid": 0}
    unit = LAYOUT.units["blocks.0.mlp"]
    full, there = (problem(10**6, measurements=measurements(widths=widths)) for widths in ({}, cut))
    ways = [knapsack.choices(one, one.oracle.measurements, unit, Prices()) for one in (full, there)]
    for a, b in zip(*ways, strict=True):
        assert (a.width, a.formats, a.nbytes) == (b.width, b.formats, b.nbytes)
        assert a.damage == pytest.approx(b.damage)


@pytest.mark.parametrize("worse", [1.01, 1.2])
def test_a_real_trial_decides_between_the_best_of_each_kind_unless_one_is_far_behind(worse):
    """Quick evaluation picks among plans that prune; what is applied for real decides against the others."""
    quick, tried = [], []

    def evaluate(plan):
        quick.append(plan)
        return (1.0 if plan.cuts else worse) + 1e-3 * plan.found_by.predicted_damage

    def trial(plan):
        tried.append(plan)
        return 2.0 if plan.cuts else 1.0

    limit = (SMALLEST + LARGEST.found_by.nbytes) // 2
    found = knapsack.search(problem(limit, evaluate=evaluate, trial=trial), Config())
    assert sum(bool(plan.cuts) for plan in quick) > 1
    assert sum(not plan.cuts for plan in quick) >= 1
    assert [bool(plan.cuts) for plan in tried] == ([True, False] if worse < knapsack.NEAR else [True])
    assert bool(found.plan.cuts) == (worse > knapsack.NEAR)
    assert found.plan.found_by.measured_damage == (2.0 if found.plan.cuts else 1.0) + REPORTED
    assert sum(one.estimated_kl is not None for one in found.tried) == len(quick)
    assert sum(one.applied_kl is not None for one in found.tried) == len(tried)


def test_without_applications_the_best_estimate_wins():
    asked = problem((SMALLEST + LARGEST.found_by.nbytes) // 2, evaluate=lambda plan: 2.0 if plan.cuts else 1.0)
    quick = dataclasses.replace(asked, measure=asked.measure.model_copy(update={"apply_finalists": False}))
    assert not knapsack.search(quick, Config()).plan.cuts


@pytest.mark.parametrize("steps", [{}, {"mid": 2}, {"kv": -1, "below 3 bits": 3}])
def test_a_price_is_not_part_of_the_predicted_damage(steps):
    asked = problem((SMALLEST + LARGEST.found_by.nbytes) // 2)
    plan, _ = knapsack.solve(asked, Config(), asked.oracle.measurements, Prices(steps))
    assert plan.cuts
    assert plan.found_by.predicted_damage == pytest.approx(additive(plan))


def test_a_kind_that_costs_more_is_chosen_less():
    asked = problem((SMALLEST + LARGEST.found_by.nbytes) // 2)

    def cut(steps):
        plan, _ = knapsack.solve(asked, Config(gap=0), asked.oracle.measurements, Prices({"mid": steps}))
        return sum(80 - len(keep) for dim, keep in plan.cuts.items() if dim.endswith("mid"))

    assert cut(-4) > cut(4)


def test_the_background_loses_next_to_nothing():
    found = knapsack.background(problem(SMALLEST), Config())
    assert found.widths == {}
    assert {p.name for site, p in found.formats.items() if "." in site} == {"uint6g64"}
    assert {p.name for site, p in found.formats.items() if "." not in site} == {"int4g32"}  # of its menu the nearest


def test_the_background_may_be_the_uniform_plan_nearest_to_the_budget():
    for name in ("uint2g32", "int4g32", "uint8row"):
        precision = formats(name)[0]
        near = problem(0).uniform(precision, "").found_by.nbytes
        for limit in (near - 500, near + 500):
            found = knapsack.background(problem(limit), Config(background=None))
            assert found.widths == {}
            assert found.formats.keys() == sites().keys()
            assert {p for site, p in found.formats.items() if "." in site} == {precision}
            tables = {p.name for site, p in found.formats.items() if "." not in site}
            assert tables == {"int4g32" if name == "uint2g32" else name}  # never below `embedding_bits`
    anchored = knapsack.background(problem(SMALLEST), Config(background=formats("uint8row")[0], embedding_bits=8))
    assert set(anchored.formats.values()) == set(formats("uint8row"))


@pytest.mark.parametrize(("bits", "table"), [(1, "ternaryrow"), (2, "int2g32")])
def test_the_background_of_a_table_has_the_nearest_bits_whole_or_not(bits, table):
    menu = formats("binaryrow", "ternaryrow", "mbinaryg32", "int2g32")
    given = problem(SMALLEST, space=SPACE.model_copy(update={"embedding_formats": menu}))
    found = knapsack.background(given, Config(background=formats("ternaryg32")[0], embedding_bits=bits))
    assert {p.name for site, p in found.formats.items() if "." not in site} == {table}
