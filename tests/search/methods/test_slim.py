"""Bits by groups on invented saliences and errors."""

from collections import Counter
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from jobs import write_text
from problems import LAYOUT as SMALL
from problems import Figures, measurements
from problems import problem as any_problem
from sessions import compress, open_session
from tiny import randomize, save_tiny, tiny_config
from trimbit.artifact.files import weight_nbytes
from trimbit.errors import BudgetError, RecipeError
from trimbit.model.build import build_layout
from trimbit.model.resolved import resolve
from trimbit.pipeline.recipes import load_recipe
from trimbit.schema.space import Space
from trimbit.search.methods import slim

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
    made = replace(
        any_problem(
            limit or 0, measurements=measurements(), figures=channels, space=Space(formats=(), embedding_formats=())
        ),
        layout=layout,
    )
    return made if limit else problem(slim.default_nbytes(made, slim.Config()), **fields)


def names(runs):
    return [run.precision.name for run in runs for _ in range(-(-run.count // 128))]


def test_groups_move_where_it_helps():
    plan = slim.search(problem(), slim.Config()).plan
    resolve(plan, LAYOUT)
    assert names(plan.weights[DOWN]) == ["binaryg128", "int2g128", "int3g128", "int2g128", "int2g128"]
    for name, runs in plan.weights.items():
        if name != DOWN and "layers" in name:
            assert [run.precision.name for run in runs] == ["int2g128"]  # nothing is gained there
    assert "1 of 17 groups" in plan.found_by.method


def test_the_number_of_groups_is_that_of_least_error():
    """Both salient groups move only if the error says so, and as many others."""
    plan = slim.search(problem(rounding_error=lambda _, runs: -float(len(names(runs)) * len(runs))), slim.Config()).plan
    for name, runs in plan.weights.items():
        if "layers" in name:
            count = Counter(names(runs))
            assert count["binaryg128"] == count["int3g128"] > 0
    assert Counter(names(plan.weights[DOWN])) == {"binaryg128": 2, "int3g128": 2, "int2g128": 1}
    assert plan.found_by.nbytes <= problem().budget_nbytes


@pytest.mark.parametrize("bits", [3, 4])
def test_other_bits(bits):
    config = slim.Config(bits=bits)
    found = problem(limit=10**8)
    plan = slim.search(found, config).plan
    assert names(plan.weights[DOWN])[2] == f"int{bits + 1}g128"
    with pytest.raises(BudgetError, match="smallest feasible budget"):
        slim.search(problem(limit=1000), config)


def test_what_does_not_fit_is_refused():
    small = problem(limit=10**8, layout=SMALL)
    with pytest.raises(RecipeError, match="has 48 input channels, fewer than two groups of 128"):
        slim.search(small, slim.Config())
    pruned = replace(problem(), space=Space(formats=(), embedding_formats=(), kept={"blocks.0.mlp.mid": 320}))
    with pytest.raises(RecipeError, match="leave `prune` out"):
        slim.require_feasible(pruned, slim.Config())


def test_the_recipe(tmp_path):
    config = tiny_config("llama")
    wide = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 32, "num_key_value_heads": 16}
    wide["num_hidden_layers"] = 1
    model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict() | wide)).eval()
    randomize(model, 0)
    model.model.layers[0].mlp.up_proj.weight.data[128:256] *= 8  # so that a group of down's inputs matters more
    save_tiny(model.bfloat16(), tmp_path / "original")
    write_text(tmp_path / "text.txt", 1500)
    small = ("calibration.rows=24", "calibration.length=32", "calibration.held_out=2", "compute=float32")
    made = open_session(
        tmp_path / "original", load_recipe("slim-w2a16", small), calibration=str(tmp_path / "text.txt")
    )  # fmt: skip
    plan = compress(made, None, tmp_path / "out")
    assert weight_nbytes(tmp_path / "out") == plan.found_by.nbytes <= made.budget_nbytes()
    assert plan.found_by.measured_damage > 0
    down = names(plan.weights[DOWN])
    assert down[1] == "int3g128"
    assert sorted(down) == ["binaryg128", "int2g128", "int3g128"]
