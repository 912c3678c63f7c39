"""Bits refined by Bayesian optimisation: start from the plan by importance, and try plans within the budget.

A trial puts the whole plan together and measures its KL on held-out tokens; the Gaussian process models the logarithm
of that. `engine: random` tries as many plans without a model, the baseline.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trimbit.cache import save_whole
from trimbit.errors import PlanError
from trimbit.plan import Plan
from trimbit.precision import Data
from trimbit.search import importance
from trimbit.search.levels import Levels, Per, levels
from trimbit.search.optimise import Box, Point, optimise, pareto, random_search, require_botorch
from trimbit.search.optimise import Config as Optimiser
from trimbit.search.problem import Problem

PAPER = "QPruner, arXiv:2412.11629"
NEEDS = ("space", "measure")


SMALLEST = 1e-9  # nats: what the logarithm of a KL of zero is taken of


class Config(Data):
    """What shares a format, the default budget, and the optimiser's constants."""

    per: Per = "block"  # code (harrysyz99/Qmixtuner): one format a block
    share: float = Field(default=0.25, ge=0, le=1)  # ours, without a budget: blocks in the largest format
    engine: Literal["bayes", "random"] = "bayes"
    optimiser: Optimiser = Optimiser()


def default_limit(problem: Problem, config: Config) -> int:
    """Bytes with `share` of the variables in the largest format."""
    return importance.default_limit(problem, importance.Config(per=config.per, share=config.share))


def require_feasible(problem: Problem, config: Config) -> None:
    """Refuse, before anything long, a missing library or a budget below the smallest formats everywhere.

    Raises:
        RecipeError: if botorch is missing.
        BudgetError: naming the smallest feasible budget.
    """
    if config.engine == "bayes":
        require_botorch()
    importance.require_feasible(problem, importance.Config(per=config.per))


def search(problem: Problem, config: Config) -> Plan:
    """The best plan tried; its notes tell the start's and the Pareto set of bytes and KL.

    Raises:
        BudgetError: if nothing fits; names the smallest feasible budget.
        PlanError: if the journal belongs to another search.
    """
    assert problem.evaluate is not None, "plans cannot be evaluated: the recipe has no `measure`"
    require_feasible(problem, config)
    found = levels(problem, config.per)
    widths = tuple(tuple(math.log2(p.bits) for p in found.formats) for _ in found.costs)
    box = Box(costs=found.costs, values=widths, limit=found.limit)
    start = [tuple(importance.allocate(found, problem.importance()))] if problem.importance is not None else []
    if not box.fits(box.lowest):  # so near the smallest budget that the bound on the header leaves no room
        return found.plan(box.lowest, "smallest")
    journal = _journal(problem)

    def evaluate(points: Sequence[Point]) -> list[float]:
        assert problem.evaluate is not None
        return [math.log(max(problem.evaluate(found.plan(point, "trial")), SMALLEST)) for point in points]

    run = optimise if config.engine == "bayes" else random_search
    with problem.reporter.stage("trials of whole plans") as progress:
        tried = run(
            box, start, evaluate, journal.read(), config.optimiser, problem.seed, progress, journal.append
        )  # fmt: skip
    return _best(found, box, tried, "Bayesian optimisation" if config.engine == "bayes" else "random search")


def trials(problem: Problem, config: Config) -> list[tuple[int, float]]:
    """Bytes and KL of every plan that a search has tried, in their order."""
    found = levels(problem, config.per)
    tried = _journal(problem).read()
    return [(found.plan(point, "trial").found_by.nbytes, math.exp(value)) for point, value in tried.items()]


def identity(config: Config) -> dict[str, Any]:
    """What of the configuration decides the order of trials; how many there are does not."""
    return config.model_dump(mode="json", exclude={"optimiser": {"trials"}, "share": True})


def _journal(problem: Problem) -> "Journal":
    return Journal(problem.journal, problem.key)


def _best(found: Levels, box: Box, tried: Sequence[tuple[Point, float]], method: str) -> Plan:
    damages = [math.exp(value) for _, value in tried]
    best = min(range(len(tried)), key=damages.__getitem__)
    front = pareto([(float(box.nbytes(point)), damage) for (point, _), damage in zip(tried, damages, strict=True)])
    notes = [f"{method}: {len(tried)} plans tried, the first {damages[0]:.4f} nats, the best {damages[best]:.4f}"]
    for at in sorted(front, key=lambda at: box.nbytes(tried[at][0])):
        nbytes = found.plan(tried[at][0], method).found_by.nbytes
        notes.append(f"Pareto: {nbytes:,} bytes, {damages[at]:.4f} nats")
    plan = found.plan(tried[best][0], method)
    told = plan.found_by.model_copy(update={"notes": tuple(notes)})
    return plan.model_copy(update={"found_by": told})


class Journal:
    """Every trial, one a line, after a line that says which search they belong to."""

    def __init__(self, path: Path | None, belongs: object) -> None:
        self.path = path
        self.header = json.dumps({"search": belongs}, sort_keys=True)

    def read(self) -> dict[Point, float]:
        """Trials so far, in their order.

        Raises:
            PlanError: if they are another search's.
        """
        if self.path is None or not self.path.exists():
            return {}
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # killed while it wrote the last line
            save_whole(self.path, lambda beside: beside.write_text(whole, encoding="utf-8"))
        if not whole:
            return {}
        header, *lines = whole.splitlines()
        if header != self.header:
            raise PlanError(f"{self.path} holds the trials of another model, space or budget; remove it")
        found: dict[Point, float] = {}
        for line in lines:
            entry = json.loads(line)
            found[tuple(entry["levels"])] = entry["value"]
        return found

    def append(self, point: Point, value: float) -> None:
        """Add one trial."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", encoding="utf-8") as file:
            lines = [self.header] if first else []
            file.write("\n".join([*lines, json.dumps({"levels": point, "value": value})]) + "\n")
