"""The results of a job, before they are written."""

from dataclasses import dataclass

from trimbit.pipeline.applying import Applied
from trimbit.pipeline.recovering import Recovered
from trimbit.pipeline.text import Text
from trimbit.schema.budget import Budget
from trimbit.schema.found import Found
from trimbit.schema.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Result:
    """The results of a job, before they are written."""

    found: Found
    applied: Applied
    text: Text | None = None
    recovered: Recovered | None = None
    recovered_kl: float | None = None
    budget: Budget | None = None
    budget_nbytes: int

    @property
    def plan(self) -> Plan:
        """The plan with its final measured damage."""
        measured = self.applied.measured.report if self.applied.measured else None
        return self.found.plan.with_provenance(
            measured_damage=measured if self.recovered_kl is None else self.recovered_kl
        )
