"""The steps of a recipe: each is a module, found by its name, with its checked configuration."""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from trimbit.errors import RecipeError
from trimbit.recover.tune import Config as Tuning
from trimbit.schema.recipe import Recipe, step_config
from trimbit.schema.recipe import Step as Named
from trimbit.search.problem import SearchMethod
from trimbit.transform.repair import lowrank, refit

STEPS = {  # recipe field: the kind of method, the room of its module, and what the module must offer
    "criterion": ("criteria", "measure.criteria", "score"),
    "search": ("search", "search.methods", "METHOD"),
    "quant": ("quant", "transform.quant", "quantize"),
    "importance": ("criteria", "measure.criteria", "information"),
    "repair": ("repair", "transform.repair", "refit"),
    "lowrank": ("repair", "transform.repair", "correct"),
    "tune": ("repair", "recover", "tune"),
}


class Step(NamedTuple):
    """A method and its configuration."""

    module: Any  # a module of one of the rooms above
    config: Any  # an instance of the module's `Config`


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """All steps of a recipe."""

    method: SearchMethod[Any]
    search: Any  # the method's configuration
    quant: Step
    criterion: Step | None
    importance: Step | None
    repair: refit.Config | None
    lowrank: lowrank.Config | None
    tune: Tuning | None


def open_steps(recipe: Recipe) -> Steps:
    """Find the modules of a recipe's steps and check their parameters.

    Raises:
        RecipeError: if there is no such method, it is of another kind, or a parameter is not valid.
    """
    search, quant = _step("search", recipe.search), _step("quant", recipe.quant)
    rest = {
        name: _step(name, own) if (own := getattr(recipe, name)) is not None else None
        for name in ("criterion", "importance", "repair", "lowrank", "tune")
    }
    configs = {name: step.config if (step := rest[name]) else None for name in ("repair", "lowrank", "tune")}
    return Steps(
        method=search.module.METHOD, search=search.config, quant=quant, criterion=rest["criterion"],
        importance=rest["importance"], **configs,
    )  # fmt: skip


def _step(field: str, named: Named) -> Step:
    kind, _, offers = STEPS[field]
    module = module_of(field, named)
    if not hasattr(module, offers):
        raise RecipeError(f"{kind} {named.name} cannot stand here: it does not offer `{offers}`")
    return Step(module, step_config(module.Config, kind, named))


def module_of(field: str, named: Named) -> ModuleType:
    """The module of a step by its name; `field` is the step's field in the recipe.

    Raises:
        RecipeError: if there is no such module.
    """
    kind, room, _ = STEPS[field]
    name = f"trimbit.{room}.{named.name}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as err:
        if err.name != name:
            raise
        raise RecipeError(f"no {kind} method {named.name!r}: there is no module {name}") from err


def resolved_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe with all parameters of its steps, defaults included."""
    fields = recipe.model_dump(mode="json")
    for field, (kind, _, _) in STEPS.items():
        named = getattr(recipe, field)
        if named is not None:
            params = step_config(module_of(field, named).Config, kind, named).model_dump(mode="json")
            fields[field] = {"name": named.name, "params": params}
    return fields
