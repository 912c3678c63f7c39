"""The results that a job would find in the cache; nothing is made."""

from collections.abc import Sequence
from functools import cached_property

from trimbit.calibrate.sample import NAME as SELF
from trimbit.jobs.journal import Journal
from trimbit.measure.damage import Change, changes
from trimbit.pipeline.applying import applied_stage
from trimbit.pipeline.candidates import candidates_of
from trimbit.pipeline.damage import corrected_stage, damage_key, predicted_stage
from trimbit.pipeline.job import Job
from trimbit.pipeline.prepare import Prepared, importance_stage, moments_stage, ranking_stage
from trimbit.pipeline.recovering import config_of, pairs_stage
from trimbit.pipeline.search import search_stage
from trimbit.pipeline.text import Text, sampled_stage, text_of
from trimbit.schema.found import Found
from trimbit.schema.measurements import Background
from trimbit.trial.candidates import CandidateWeights


class There:
    """The cached results of a job's stages; a stage whose inputs are not cached counts as not cached."""

    def __init__(self, job: Job, budget_nbytes: int) -> None:
        self.job, self.budget_nbytes = job, budget_nbytes

    @cached_property
    def text(self) -> Text | None:
        """The text, unless it must be sampled first."""
        job = self.job
        if not job.needs_text:
            return None
        there = job.calibration != SELF or job.runner.has(sampled_stage(job, job.checkpoint.tokenizer()))
        return text_of(job) if there else None

    @cached_property
    def moments(self) -> bool:
        """Whether the moments are cached."""
        return self.text is not None and self.job.runner.has(moments_stage(self.job, self.text))

    @cached_property
    def prepared(self) -> Prepared | None:
        """What a job makes before it needs a budget, if all of it is cached."""
        job, text = self.job, self.text
        if not job.needs_text:
            return Prepared(text=None, stats=None, rankings={})
        if text is None or (job.needs_moments and not self.moments):
            return None
        stats = job.runner.run(moments_stage(job, text)) if job.needs_moments else None
        if job.steps.criterion is None:
            return Prepared(text=text, stats=stats, rankings={})
        ranking = ranking_stage(job, text, stats)
        if not job.runner.has(ranking):
            return None
        rankings = {dim: tuple(order) for dim, order in job.runner.run(ranking).items()}
        return Prepared(text=text, stats=stats, rankings=rankings)

    @cached_property
    def importance(self) -> bool:
        """Whether the importance of layers is cached."""
        return self.prepared is not None and self.job.runner.has(importance_stage(self.job, self.prepared))

    @cached_property
    def found(self) -> Found | None:
        """The result of the search, if it is cached."""
        if self.prepared is None:
            return None
        stage = search_stage(self.job, self.prepared, self.budget_nbytes)
        return self.job.runner.run(stage) if self.job.runner.has(stage) else None

    @cached_property
    def applied(self) -> bool:
        """Whether the found plan was applied."""
        if self.prepared is None or self.found is None:
            return False
        return self.job.runner.has(applied_stage(self.job, self.prepared, self.found.plan, ""))

    @cached_property
    def pairs(self) -> bool:
        """Whether the pairs of the found plan were trained."""
        if self.prepared is None or self.found is None or not self.applied:
            return False
        job, plan = self.job, self.found.plan
        own = job.runner.run(applied_stage(job, self.prepared, plan, ""))
        return job.runner.has(pairs_stage(job, self.prepared, plan, own, config_of(job)))

    @cached_property
    def predicted(self) -> bool:
        """Whether the damage of choices was predicted."""
        if self.prepared is None:
            return False
        return self.job.runner.has(predicted_stage(self.job, self.prepared, self._candidates))

    @cached_property
    def corrected(self) -> bool:
        """Whether the predictions were corrected."""
        if self.prepared is None or not self.predicted:
            return False
        found = self.job.runner.run(predicted_stage(self.job, self.prepared, self._candidates))
        stage = corrected_stage(self.job, self.prepared, found, self._candidates)
        return stage is not None and self.job.runner.has(stage)

    def _candidates(self) -> CandidateWeights:
        assert self.prepared is not None
        return candidates_of(self.job, self.prepared)

    def damage(self, background: Background) -> tuple[Sequence[Change], int]:
        """The changes whose damage is not known yet, and how many there are in all."""
        job, prepared = self.job, self.prepared
        full = {unit.dim: tuple(range(unit.size)) for unit in job.layout.units.values() if unit.dim is not None}
        work = changes(job.layout, job.space, background, prepared.rankings if prepared else full)
        if prepared is None:
            return work, len(work)
        key = damage_key(job, prepared, background)
        path = job.runner.cache.path(key.stage, key.digest) / "journal.jsonl"
        known = {entry["change"] for entry in Journal(path).read()} if path.is_file() else set()
        return [change for change in work if change.key not in known], len(work)
