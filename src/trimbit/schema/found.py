"""The result of a search: the plan, and the plans that were tried on the way."""

from trimbit.schema.base import Schema
from trimbit.schema.objective import Outcome
from trimbit.schema.plan import Plan


class Tried(Schema):
    """A plan that was tried, and what was measured of it; KL in nats a token, on the rows that plans are chosen by."""

    plan: Plan
    estimated_kl: float | None = None  # assembled from candidates
    applied_kl: float | None = None  # applied for real
    outcome: Outcome | None = None  # of a search by whole plans


class Found(Schema):
    """What a search found."""

    plan: Plan
    tried: tuple[Tried, ...] = ()
    curve: tuple[dict[str, float], ...] = ()  # of a training, a step each
    gap: float | None = None  # relative distance to the proven optimum, where a solver proves one
