"""What a job computes before it needs a budget: moments, rankings, importance of layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trimbit.calibrate.stats import Stats, collect
from trimbit.jobs.checked import load_json, save_json
from trimbit.jobs.stages import Stage, StageKey, Work
from trimbit.measure.layer_importance import layer_information
from trimbit.measure.ranking import Rankings, by_gradients, by_moments
from trimbit.model.resolved import cut_alone
from trimbit.pipeline.job import Job, plain
from trimbit.pipeline.keys import ImportanceKey, MomentsKey, RankingKey
from trimbit.pipeline.text import Text, text_of
from trimbit.schema.base import digest
from trimbit.transform.cut import cut_unit


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The text, the moments of every site's inputs, and the ranking of channels; None or empty if no step reads it."""

    text: Text | None
    stats: Stats | None
    rankings: Mapping[str, tuple[int, ...]]  # dim -> its indices, most important first

    @property
    def digest(self) -> str | None:
        """The digest of the whole text."""
        return digest(self.text.digests) if self.text is not None else None


def prepare(job: Job) -> Prepared:
    """Make what every budget shares; each part is cached by its content."""
    text = text_of(job) if job.needs_text else None
    stats = moments(job, text) if text is not None else None
    return Prepared(text=text, stats=stats, rankings=rank(job, text, stats) if text is not None else {})


def moments_key(job: Job, text: Text) -> MomentsKey:
    """The key of the moments."""
    rotation = job.recipe.rotation
    return MomentsKey(
        weights=job.model.weights_hash, config=job.model.config_hash, tokens=text.fit.digest,
        compute=job.recipe.compute, rotation=rotation.model_dump(mode="json") if rotation else None,
    )  # fmt: skip


def moments(job: Job, text: Text) -> Stats | None:
    """Second moments of the dense model's inputs, where any step reads them."""
    return job.runner.run(moments_stage(job, text)) if job.needs_moments else None


def moments_stage(job: Job, text: Text) -> Stage[Stats]:
    """The stage that collects the moments."""
    tokens = text.fit.tokens

    def make(work: Work) -> None:
        collect(job.stream, tokens, work.folder, work.progress)

    def load(folder: Path) -> Stats:
        return Stats(folder, tokens.numel())

    return Stage(key=moments_key(job, text), title="statistics", make=make, load=load)


def rank(job: Job, text: Text, stats: Stats | None) -> Rankings:
    """For each dim, its indices, most important first; empty if the recipe has no criterion."""
    if job.steps.criterion is None:
        return {}
    found = job.runner.run(ranking_stage(job, text, stats))
    return {dim: tuple(order) for dim, order in found.items()}


def ranking_stage(job: Job, text: Text, stats: Stats | None) -> Stage[dict[str, list[int]]]:
    """The stage that ranks the indices of each dim."""
    assert job.steps.criterion is not None
    module, config = job.steps.criterion

    def make(work: Work) -> None:
        if module.READS == "moments":
            assert stats is not None
            found = by_moments(module, config, job.stream, stats, work.progress)
        else:
            found = by_gradients(module, config, job.stream, text.fit.tokens, work.progress)
        save_json(work.folder / "ranking.json", found)

    key = RankingKey(moments=moments_key(job, text).digest, criterion=plain(job.recipe.criterion))
    return _json(key, "ranking of channels and heads", make, "ranking.json")


def layer_importance(job: Job, prepared: Prepared) -> dict[str, float]:
    """The importance of each block and sub-block of the pruned model to the task."""
    return job.runner.run(importance_stage(job, prepared))


def importance_stage(job: Job, prepared: Prepared) -> Stage[dict[str, float]]:
    """The stage that finds the importance of layers."""
    text = prepared.text
    assert text is not None
    assert job.steps.importance is not None
    config = job.steps.importance.config

    def load(index: int) -> nn.Module:
        return _pruned(job, prepared, index)

    def make(work: Work) -> None:
        save_json(
            work.folder / "importance.json",
            layer_information(job.stream, load, text.fit.tokens, config, work.progress),
        )

    key = ImportanceKey(
        moments=moments_key(job, text).digest,
        importance=plain(job.recipe.importance),
        kept=kept_members(prepared, job.space.kept),
    )
    return _json(key, "importance of each layer", make, "importance.json")


def kept_members(prepared: Prepared, widths: Mapping[str, int]) -> dict[str, list[int]]:
    """The members of each dim that a width keeps."""
    return {dim: sorted(prepared.rankings[dim][:width]) for dim, width in widths.items()}


def _json(key: StageKey, title: str, make: Callable[[Work], None], name: str) -> Stage[Any]:
    def load(folder: Path) -> Any:  # noqa: ANN401
        return load_json(folder / name)

    return Stage(key=key, title=title, make=make, load=load)


def _pruned(job: Job, prepared: Prepared, index: int) -> nn.Module:
    """A block cut to the widths that are fixed before the search."""
    block = job.stream.load(index)
    for unit in job.layout.units.values():
        width = job.space.kept.get(unit.dim or "")
        if unit.block == index and unit.dim is not None and width is not None:
            keep = tuple(sorted(prepared.rankings[unit.dim][:width]))
            cut_unit(block, job.layout, cut_alone(job.layout, unit, keep), f"{job.layout.family.blocks}.{index}.")
    return block
