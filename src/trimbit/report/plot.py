"""Pictures need matplotlib, an optional package."""

import importlib.util

from trimbit.errors import RecipeError


def require_plot() -> None:
    """Fail early if a picture cannot be drawn.

    Raises:
        RecipeError: if matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError("the search draws a picture: pip install 'trimbit[plot]'")
