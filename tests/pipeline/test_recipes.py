"""Recipes: those that come along load; what is unknown or wrong is an error that says where."""

import pytest
import yaml

from trimbit.errors import RecipeError
from trimbit.measure.criteria import obs
from trimbit.pipeline import recipes
from trimbit.pipeline.recipes import load_recipe
from trimbit.pipeline.steps import module_of
from trimbit.schema.precision import parse_precision
from trimbit.schema.recipe import step_config
from trimbit.search.methods import knapsack
from trimbit.transform.quant import gptq

MINIMAL = "description: d\nsource: s\nsearch: {name: uniform}\nquant: {name: rtn}\n"


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "own.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_that_comes_along_loads(name):
    found = load_recipe(name)
    assert found.description
    assert found.source
    stages = {"search": found.search, "quant": found.quant, "repair": found.repair, "criterion": found.criterion}
    for stage, step in stages.items():
        if step is not None:
            step_config(module_of(stage, step).Config, stage, step)
    if found.measure:
        assert found.calibration.rows >= found.measure.rows


def test_the_recipes_of_the_readme_are_there():
    assert {"knapsack", "knapsack-nopruning", "uniform-gptq", "uniform-rtn"} <= set(recipes.names())


def test_unknown_recipe_names_the_known():
    with pytest.raises(RecipeError, match=r"no recipe 'nonesuch'; known are .*knapsack"):
        load_recipe("nonesuch")
    with pytest.raises(RecipeError, match=r"no recipe 'nonesuch\.yaml'"):
        load_recipe("nonesuch.yaml")


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ("serach: {}", "serach: unknown key"),
        ("space: {formats: [], embedding_formats: [], width: [1.0]}", r"space\.width: unknown key"),
        ("space: {formats: [int9g32], embedding_formats: []}", r"space\.formats\.0: unknown number format 'int9g32'"),
        ("measure: {rows: 0}", r"measure\.rows: .*greater than or equal to 1"),
        ("measure: {rows: two}", r"measure\.rows: .*valid integer"),
        ("compute: float16", "compute: .*'bfloat16' or 'float32'"),
        ("quant: {nam: rtn}", r"quant\.name: Field required"),
    ],
)
def test_unknown_keys_and_bad_values_say_where(file, extra, where):
    text = MINIMAL.replace("quant: {name: rtn}\n", "") if extra.startswith("quant") else MINIMAL
    with pytest.raises(RecipeError, match=f"^own: {where}"):
        load_recipe(file(text + extra + "\n"))


@pytest.mark.parametrize(
    ("text", "why"), [("a: [", "not YAML"), ("- a\n- b\n", "a recipe is a mapping"), ("", "a recipe is a mapping")]
)
def test_not_a_recipe(file, text, why):
    with pytest.raises(RecipeError, match=why):
        load_recipe(file(text))


def test_not_text(tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(str(tmp_path / "own.yaml"))


def test_overrides():
    found = load_recipe(
        "knapsack",
        (
            "calibration.rows=64",
            "measure.length=32",
            "space.widths=[1.0, 0.5]",
            "space.formats=[int4g32]",
            "search.plans=4",
            "quant.damping=0.1",
            "criterion.name=activation",
            "criterion.kind=wanda_sp",
            "compute=float32",
        ),
    )
    assert found.calibration.rows == 64
    assert found.calibration.length == load_recipe("knapsack").calibration.length
    assert found.measure.length == 32
    assert found.space.widths == (1.0, 0.5)
    assert found.space.formats == (parse_precision("int4g32"),)
    assert found.search.params["plans"] == 4
    assert found.quant.params == {"damping": 0.1}
    assert (found.criterion.name, found.criterion.params) == ("activation", {"kind": "wanda_sp"})
    assert found.compute == "float32"
    config = step_config(knapsack.Config, "search", found.search)
    assert config.plans == 4
    assert step_config(gptq.Config, "quant", found.quant).damping == 0.1


@pytest.mark.parametrize("written", ["1e-5", "1E-5", "1.e-5", "1.0e-05", "0.00001", "+1e-5"])
def test_numbers_may_be_written_with_an_exponent(written):
    recipe = load_recipe("qpruner-1", (f"tune.learning_rate={written}",))
    assert recipe.tune.params["learning_rate"] == 1e-5


def test_an_override_may_make_a_stage(file):
    found = load_recipe(file(MINIMAL), ("measure.rows=2", "criterion.name=obs", "criterion.rounds=7"))
    assert found.measure.rows == 2
    assert step_config(obs.Config, "criteria", found.criterion).rounds == 7


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("calibration.rows", "cannot read the override"),
        ("=4", "cannot read the override"),
        ("calibration..rows=4", "cannot read the override"),
        ("calibration.row=4", r"calibration\.row: unknown key"),
        ("calibration.rows=many", r"calibration\.rows: "),
        ("calibration.rows=[", "the value is not YAML"),
        ("source.type=float32", "source has no parameters"),
        ("nonesuch.rows=4", "nonesuch: unknown key"),
    ],
)
def test_bad_overrides(override, why):
    with pytest.raises(RecipeError, match=why):
        load_recipe("knapsack", (override,))


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("search.steps=200", r"search knapsack: steps: unknown key"),
        ("search.gap=-1", r"search knapsack: gap: .*greater than or equal to 0"),
        ("search.plans=0", r"search knapsack: plans"),
        ("search.gap=wide", r"search knapsack: gap: .*valid number"),
    ],
)
def test_a_step_checks_its_parameters(override, why):
    found = load_recipe("knapsack", (override,))
    with pytest.raises(RecipeError, match=why):
        step_config(knapsack.Config, "search", found.search)


def test_unknown_method():
    found = load_recipe("knapsack", ("search.name=nonesuch",))
    with pytest.raises(RecipeError, match=r"no search method 'nonesuch'"):
        module_of("search", found.search)


@pytest.mark.parametrize("name", recipes.names())
def test_yaml_round_trip(name, tmp_path):
    found = load_recipe(name, ("search.tries=3",))
    (tmp_path / "recipe.yaml").write_text(found.to_yaml(), encoding="utf-8")
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == found
    assert yaml.safe_load(found.to_yaml())["search"]["params"]["tries"] == 3
