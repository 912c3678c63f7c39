"""Bits by groups on invented saliences and errors."""

from collections import Counter
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from problems import LAYOUT as SMALL
from problems import REF, Figures
from trimbit.errors import BudgetError, RecipeError
from trimbit.measurements import Space
from trimbit.model.layout import build_layout
from trimbit.search import slim
from trimbit.search.problem import Problem

LAYOUT = build_layout(
    LlamaConfig(
        hidden_size=320, num_hidden_layers=1, num_attention_heads=5, num_key_value_heads=5, intermediate_size=640,
        vocab_size=64,
    )
)  # fmt: skip
DOWN = "model.layers.0.mlp.down_proj"


def salience(name):
    """Of five groups of `down_proj` the third is worth most, the first least; elsewhere all are worth the same."""
    cols = LAYOUT.weights[name].cols
    return [[1.0, 3.0, 9.0, 2.0, 5.0][channel // 128] if name == DOWN else 1.0 for channel in range(cols)]


def error(name, runs):
    """Every group loses what it is worth times 4^-bits."""
    worth, total, at = salience(name), 0.0, 0
    for run in runs:
        total += sum(worth[at : at + run.count]) * 4.0**-run.precision.bits
        at += run.count
    return total


def problem(limit=None, layout=LAYOUT, **fields):
    channels = Figures(**{"salience": salience, "rounding_error": error} | fields)
    made = Problem(
        layout=layout, model=REF, limit=limit or 0, space=Space(formats=(), table_formats=()), rankings={},
        recipe={}, calibration="self", seed=0, channels=channels,
    )  # fmt: skip
    return made if limit else problem(slim.default_limit(made, slim.Config()), **fields)


def names(runs):
    return [run.precision.name for run in runs for _ in range(-(-run.count // 128))]


def test_groups_move_where_it_helps():
    plan = slim.search(problem(), slim.Config())
    LAYOUT.check(plan)
    assert names(plan.weights[DOWN]) == ["binaryg128", "int2g128", "int3g128", "int2g128", "int2g128"]
    for name, runs in plan.weights.items():
        if name != DOWN and "layers" in name:
            assert [run.precision.name for run in runs] == ["int2g128"]  # nothing is gained there
    assert "1 of 17 groups" in plan.found_by.method


def test_the_number_of_groups_is_that_of_least_error():
    """Both salient groups move only if the error says so, and as many others."""
    plan = slim.search(problem(rounding_error=lambda _, runs: -float(len(names(runs)) * len(runs))), slim.Config())
    for name, runs in plan.weights.items():
        if "layers" in name:
            count = Counter(names(runs))
            assert count["binaryg128"] == count["int3g128"] > 0
    assert Counter(names(plan.weights[DOWN])) == {"binaryg128": 2, "int3g128": 2, "int2g128": 1}
    assert plan.found_by.nbytes <= problem().limit


@pytest.mark.parametrize("bits", [3, 4])
def test_other_bits(bits):
    config = slim.Config(bits=bits)
    found = problem(limit=10**8)
    plan = slim.search(found, config)
    assert names(plan.weights[DOWN])[2] == f"int{bits + 1}g128"
    with pytest.raises(BudgetError, match="smallest feasible budget"):
        slim.search(problem(limit=1000), config)


def test_what_does_not_fit_is_refused():
    small = problem(limit=10**8, layout=SMALL)
    with pytest.raises(RecipeError, match="has 48 input channels, fewer than two groups of 128"):
        slim.search(small, slim.Config())
    pruned = replace(problem(), space=Space(formats=(), table_formats=(), kept={"blocks.0.mlp.mid": 320}))
    with pytest.raises(RecipeError, match="leave `prune` out"):
        slim.require_feasible(pruned, slim.Config())
