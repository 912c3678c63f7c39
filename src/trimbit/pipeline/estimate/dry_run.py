"""The dry run: seconds and memory of a job by stage, from pieces that are timed on the opened model."""

from collections.abc import Callable

from trimbit.calibrate.sample import NAME as SELF
from trimbit.jobs.hardware import resident_nbytes
from trimbit.measure.corrected import count_to_measure
from trimbit.pipeline.estimate.costs import Costs
from trimbit.pipeline.estimate.footprint import HEAP, Footprint
from trimbit.pipeline.estimate.there import There
from trimbit.pipeline.estimate.timing import Pieces
from trimbit.pipeline.job import Job
from trimbit.pipeline.oracle import problem_of
from trimbit.pipeline.preflight import preflight
from trimbit.pipeline.recovering import config_of
from trimbit.recover.tune import Config as Tuning
from trimbit.schema.budget import Budget
from trimbit.schema.estimate import Estimate, StageEstimate
from trimbit.search.two_formats.config import MaskedSearch


def estimate(job: Job, budget: Budget | None) -> Estimate:
    """Estimate the seconds and memory of a job, and say which stages are cached; checks that the budget is feasible.

    Stages have their names from `run.json`, in the order of the flow; cached stages are not timed.
    """
    budget_nbytes = preflight(job, budget)
    opened = resident_nbytes()
    stages = _Stages(job, budget_nbytes, opened)
    stages.prepare()
    stages.search()
    stages.finish()
    want = job.recipe.calibration
    text = f"{job.rows} rows of {want.length} tokens, {job.calibration}" if job.needs_text else "none"
    return Estimate(
        model=job.checkpoint.model_id, parameters=job.layout.parameters, budget_nbytes=budget_nbytes, text=text,
        opened_nbytes=opened, stages=tuple(stages.found.values()),
    )  # fmt: skip


class _Stages:
    """The stages of a job, added up one after the other."""

    def __init__(self, job: Job, budget_nbytes: int, opened: int) -> None:
        self.job, self.opened, self.there = job, opened, There(job, budget_nbytes)
        self.effort = job.steps.method.effort(problem_of(job, budget_nbytes), job.steps.search)
        self.costs = Costs(job, Pieces(job), self.effort)
        self.holds = Footprint(job, self.effort, budget_nbytes)
        self.found: dict[str, StageEstimate] = {}
        self._taught: set[str] = set()  # uses of text whose rows the original has been run on

    def _add(
        self, stage: str, seconds: Callable[[], float], held: Callable[[], int], *, cached: bool = False, runs: int = 1
    ) -> None:
        before, nbytes = self.found.get(stage), 0 if cached else HEAP + held()
        self.found[stage] = StageEstimate(
            stage=stage, cached=cached and (before is None or before.cached),
            runs=runs + (before.runs if before else 0),
            seconds=(0.0 if cached else runs * seconds()) + (before.seconds if before else 0.0),
            peak_rss_nbytes=max(self.opened + nbytes, before.peak_rss_nbytes if before else 0),
        )  # fmt: skip

    def prepare(self) -> None:
        """The stages that all budgets share."""
        job, costs, holds, there = self.job, self.costs, self.holds, self.there
        if not job.needs_text:
            return
        if job.calibration == SELF:
            self._add("text", costs.text, holds.text, cached=there.text is not None)
        if job.needs_moments:
            self._add("moments", costs.moments, holds.moments, cached=there.moments)
        if job.steps.criterion is not None:
            self._add("ranking", costs.ranking, holds.ranking, cached=there.prepared is not None)

    def search(self) -> None:
        """The search, and the stages inside it."""
        job, costs, holds, effort = self.job, self.costs, self.holds, self.effort
        if self.there.found is not None:
            self._add("plan", lambda: 0.0, lambda: 0, cached=True)
            return
        if effort.importance:
            self._add("importance", costs.importance, holds.importance, cached=self.there.importance)
        if effort.background is not None:
            self._damage()
        trained = job.objective is not None and job.objective.steps > 0
        inside = [holds.masked()]
        if effort.damage_rounds or effort.assembled or (effort.trials and not trained):
            inside.append(holds.measuring(damage=effort.damage_rounds > 0))
        applied = effort.applied + (effort.trials if trained else 0)
        if applied:
            self._apply(applied)
            inside.append(holds.applied())
        if job.objective is not None and trained:
            self._recover(config_of(job, job.objective.steps), effort.trials)
            inside.append(holds.pairs())
        if isinstance(job.steps.search, MaskedSearch):
            want = job.recipe.calibration
            rows = job.steps.search.compared((want.training or want.rows) * (want.length // job.steps.search.length))
            self._teach(held_out=want.held_out * want.length, train=rows * job.steps.search.length)
        self._add("plan", costs.plan, lambda: max(inside))

    def _damage(self) -> None:
        assert self.effort.background is not None
        if self.job.predicts:
            self._predicted()
            return
        left, count = self.there.damage(self.effort.background)
        rounds = self.effort.damage_rounds
        share = (len(left) + (rounds - 1) * count) / (rounds * count)
        self._add(
            "damage", lambda: self.costs.damage(left, share) if left else 0.0,
            lambda: self.holds.measuring(damage=True), runs=rounds,
        )  # fmt: skip

    def _predicted(self) -> None:
        job, there = self.job, self.there
        self._add("predicted", self.costs.predicted, self.holds.predicted, cached=there.predicted)
        if count := count_to_measure(job.layout, job.space):
            self._add(
                "corrected", lambda: self.costs.corrected(count), lambda: self.holds.corrected(count),
                cached=there.corrected,
            )  # fmt: skip

    def finish(self) -> None:
        """Applying the found plan, unless the search has done that, and training its pairs."""
        tune = self.job.steps.tune
        if not self.effort.applied or self.there.found is not None:
            self._apply(1, cached=self.there.applied)
        if tune is not None:
            self._recover(tune, 1, cached=self.there.pairs)

    def _apply(self, runs: int, *, cached: bool = False) -> None:
        want = self.job.recipe.calibration
        if self.job.needs_text and not cached:
            self._teach(held_out=want.held_out * want.length, report=want.report * want.length)
        self._add("applied", self.costs.applied, self.holds.applied, cached=cached, runs=runs)

    def _teach(self, *, cached: bool = False, **uses: int) -> None:
        """Run the original on the tokens of each use of text that it has not been run on."""
        tokens = sum(count for use, count in uses.items() if use not in self._taught)
        self._taught |= uses.keys()
        if tokens:
            self._add("teacher", lambda: self.costs.teacher(tokens), lambda: self.holds.teacher(tokens), cached=cached)

    def _recover(self, config: Tuning, runs: int, *, cached: bool = False) -> None:
        want = self.job.recipe.calibration
        rows = min(config.steps * config.batch, (want.training or want.rows) * max(1, want.length // config.length))
        train = rows * config.length if config.loss == "distill" else 0
        self._teach(cached=cached, train=train, report=want.report * want.length)
        self._add("pairs", lambda: self.costs.pairs(config), self.holds.pairs, cached=cached, runs=runs)
