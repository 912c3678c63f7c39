"""Types and shapes, checked on every call: by beartype alone where no shape is annotated.

jaxtyping binds the arguments of every call, and keeps the sizes of named axes; without shapes that checks nothing
more, and it takes half the time of a tiny job. To be imported before the package is.
"""

import dataclasses
import inspect
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import beartype

_jaxtyped = jaxtyping.jaxtyped


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
    """Whether an annotation names jaxtyping; a string may, and may name what only mypy imports."""
    return any(isinstance(one, str) or "jaxtyping" in repr(one) for one in function.__annotations__.values())


jaxtyping.jaxtyped = _checked  # what is imported from now on is checked by it
