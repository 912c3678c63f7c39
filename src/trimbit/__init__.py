"""Trimbit fits a language model to a budget.

After `import trimbit`, `transformers.AutoModelForCausalLM.from_pretrained` loads compressed directories. The functions
below are loaded when they are first used: the import alone loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimbit.runtime.registration import register_with_transformers as _register_with_transformers

if TYPE_CHECKING:
    from trimbit.evaluate.perplexity import evaluate as eval
    from trimbit.pipeline.flow import apply, compress, find_plan
    from trimbit.pipeline.preflight import open_job
    from trimbit.pipeline.recipes import load_recipe
    from trimbit.schema.budget import Budget

    __version__: str

_PUBLIC = {  # name: where it is; a room of the same name would hide it
    "Budget": "trimbit.schema.budget:Budget",
    "apply": "trimbit.pipeline.flow:apply",
    "compress": "trimbit.pipeline.flow:compress",
    "eval": "trimbit.evaluate.perplexity:evaluate",
    "find_plan": "trimbit.pipeline.flow:find_plan",
    "load_recipe": "trimbit.pipeline.recipes:load_recipe",
    "open_job": "trimbit.pipeline.preflight:open_job",
}

__all__ = ["Budget", "__version__", "apply", "compress", "eval", "find_plan", "load_recipe", "open_job"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name == "__version__":
        from importlib.metadata import version

        return version("trimbit")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trimbit' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = globals()[name] = getattr(import_module(module), attribute)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register_with_transformers()
