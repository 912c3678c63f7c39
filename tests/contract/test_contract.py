"""What every search method, quantiser and criterion offers; new files are found by themselves."""

import importlib
import inspect
import pkgutil

import pytest

import trimbit.measure.criteria
import trimbit.search.methods
import trimbit.transform.quant
from trimbit.measure.criteria import mutual_information
from trimbit.schema.base import Schema
from trimbit.schema.recipe import Recipe


def modules(package):
    names = [f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(name) for name in names]


SEARCHES = modules(trimbit.search.methods)
QUANTS = [module for module in modules(trimbit.transform.quant) if hasattr(module, "quantize")]
CRITERIA = modules(trimbit.measure.criteria)


def name(module):
    return ".".join(module.__name__.split(".")[-2:])


def arguments(function):
    return list(inspect.signature(function).parameters)


def test_the_walk_finds_what_there_is():
    found = {name(module) for module in (*SEARCHES, *QUANTS, *CRITERIA)}
    assert found >= {
        "methods.knapsack",
        "methods.uniform",
        "methods.preset",
        "methods.importance",
        "methods.bayes",
        "methods.outliers",
        "methods.shares",
        "methods.toga",
        "quant.rtn",
        "quant.gptq",
        "criteria.obs",
        "criteria.activation",
        "criteria.taylor",
    }


@pytest.mark.parametrize("module", [*SEARCHES, *QUANTS, *CRITERIA], ids=name)
def test_has_a_paper_and_a_configuration_with_defaults(module):
    assert isinstance(module.PAPER, str)
    assert module.PAPER
    assert issubclass(module.Config, Schema)
    assert module.Config is not Schema
    assert module.Config.model_validate_json("{}") == module.Config()
    assert module.Config.model_config["extra"] == "forbid"
    assert module.Config.model_config["frozen"]
    assert module.__doc__


@pytest.mark.parametrize("module", SEARCHES, ids=name)
def test_a_search(module):
    assert arguments(module.search) == ["problem", "config"]
    assert arguments(module.require_feasible) == ["problem", "config"]
    assert set(module.NEEDS) <= set(Recipe.model_fields)


@pytest.mark.parametrize("module", QUANTS, ids=name)
def test_a_quantiser(module):
    assert arguments(module.quantize) == ["w", "moments", "runs", "config"]
    assert arguments(module.quantize_all) == ["ws", "moments", "runs", "config"]
    assert isinstance(module.NEEDS_MOMENTS, bool)


@pytest.mark.parametrize("module", [module for module in CRITERIA if hasattr(module, "score")], ids=name)
def test_a_criterion(module):
    reads = {"moments": ["w", "moments"], "gradients": ["parts"]}[module.READS]
    assert arguments(module.score) == [*reads, "size", "config"]


def test_what_ranks_layers():
    assert arguments(mutual_information.information) == ["x", "y", "config"]
