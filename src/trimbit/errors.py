"""Every error a user can cause, each with the exit code of the command line.

A message says what is wrong, where (full weight path or file), the two numbers that disagree, and what to do.
"""


class TrimbitError(Exception):
    """Base of all errors that a user can cause; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class CheckpointError(TrimbitError):
    """A model that cannot be read: missing, truncated, pickled, non-finite, or already compressed."""


class LayoutError(TrimbitError):
    """A model whose family or shapes the family table does not describe."""


class RecipeError(TrimbitError):
    """A recipe, or an override of one, that is not valid."""


class PlanError(TrimbitError):
    """A plan that is not valid, or that belongs to another model."""


class BudgetError(TrimbitError):
    """A budget that cannot be read or met; names the smallest feasible one."""


class DataError(TrimbitError):
    """Calibration or evaluation text that cannot be used."""


class NumericsError(TrimbitError):
    """A matrix that is not positive definite, or a value that is not finite."""


class ArtifactError(TrimbitError):
    """An output directory that cannot be written, or a compressed model that cannot be read."""
