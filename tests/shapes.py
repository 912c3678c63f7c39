"""Types and shapes, checked on every call: by beartype alone where no shape is annotated.

jaxtyping binds the arguments of every call, and keeps the sizes of named axes; without shapes that checks nothing
more, and it takes half the time of a tiny job.
"""

import dataclasses
import inspect
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import beartype

_jaxtyped = jaxtyping.jaxtyped


def install() -> None:
    """Check what is imported from now on. jaxtyping's import hook decorates all functions and classes."""
    jaxtyping.jaxtyped = _checked


def _checked(*, typechecker: Any) -> Any:
    """Stands for `jaxtyping.jaxtyped` in what the import hook writes."""

    def decorate(found: Any) -> Any:
        if isinstance(found, FunctionType) and not _has_shapes(found):
            return beartype(found)
        if inspect.isclass(found) and dataclasses.is_dataclass(found) and not _has_shapes(found.__init__):
            if "__init__" in vars(found):
                found.__init__ = beartype(found.__init__)
            return found
        return _jaxtyped(typechecker=typechecker)(found)

    return decorate


def _has_shapes(function: Any) -> bool:
    """Whether an annotation names jaxtyping; a string with more than a class's name is taken as if it did."""
    return any(
        "[" in one if isinstance(one, str) else "jaxtyping" in repr(one) for one in function.__annotations__.values()
    )
