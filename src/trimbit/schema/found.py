"""The result of a search: the plan found, and the plans tried on the way."""

from trimbit.schema.base import Schema
from trimbit.schema.measurements import Correction
from trimbit.schema.objective import Outcome
from trimbit.schema.plan import Plan


class Tried(Schema):
    """A plan that was tried, and its measured results; KL in nats a token, on the rows used to choose plans."""

    plan: Plan
    estimated_kl: float | None = None  # of a model assembled from candidates
    applied_kl: float | None = None  # of the plan applied for real
    outcome: Outcome | None = None  # only in searches over whole plans


class Found(Schema):
    """The result of a search."""

    plan: Plan
    tried: tuple[Tried, ...] = ()
    curve: tuple[dict[str, float], ...] = ()  # of a training of masks, one entry per step
    corrections: tuple[Correction, ...] = ()  # of predicted damage
    gap: float | None = None  # relative gap to the optimum, as proven by the solver; None: nothing proven
