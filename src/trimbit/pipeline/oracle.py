"""The oracle of a job: the damage of choices and plans, found on the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from trimbit.evaluate.lm_eval import score_tasks
from trimbit.evaluate.tasks import mean_score, task_keys
from trimbit.jobs.cache import Cache
from trimbit.jobs.checked import save_json
from trimbit.jobs.journal import Journal
from trimbit.jobs.pool import Workers
from trimbit.jobs.stages import Runner
from trimbit.measure.choices import background_of
from trimbit.measure.damage import install, measure
from trimbit.measure.kl_probe import KLProbe
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.model.forward.logits import Divergence
from trimbit.pipeline.applying import applied, applied_stage
from trimbit.pipeline.candidates import candidates_key, candidates_of
from trimbit.pipeline.damage import corrected_stage, damage_key, predicted_stage
from trimbit.pipeline.job import Job, plain
from trimbit.pipeline.keys import OutcomesKey, SharesKey
from trimbit.pipeline.masks import masked_model
from trimbit.pipeline.prepare import Prepared, layer_importance, moments_key, prepare
from trimbit.pipeline.recovering import (
    config_of,
    examples_of,
    pairs_stage,
    rows_digest,
    teacher_of,
    with_recovered,
)
from trimbit.pipeline.text import Text
from trimbit.recover.tune import result_fields
from trimbit.schema.base import digest
from trimbit.schema.measurements import Background, Measurements
from trimbit.schema.objective import Objective, Outcome
from trimbit.schema.plan import Plan
from trimbit.schema.recipe import Recipe
from trimbit.search.problem import Measured, Problem
from trimbit.trial.candidates import CandidateWeights
from trimbit.trial.channels import ChannelFigures
from trimbit.trial.masked.model import MaskedModel

if TYPE_CHECKING:
    from trimbit.search.two_formats.config import MaskedSearch


class ModelOracle:
    """Measures on the model in memory, or in processes that hold a model each, until it is released."""

    def __init__(self, job: Job, prepared: Prepared) -> None:
        self.job, self.prepared = job, prepared
        self._workers: Workers[Plan, Outcome] | None = None
        self._masked: tuple[MaskedSearch, MaskedModel] | None = None

    def __enter__(self) -> "ModelOracle":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._masked = None

    def release(self) -> None:
        """Free the model in memory and end the processes."""
        for name in ("_model", "_damage_probe", "_choose_probe"):
            self.__dict__.pop(name, None)
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    @property
    def text(self) -> Text:
        """The job's text."""
        assert self.prepared.text is not None, "a recipe that measures needs text"
        return self.prepared.text

    @cached_property
    def candidates(self) -> CandidateWeights:
        """The weights of every choice."""
        return candidates_of(self.job, self.prepared)

    def channels(self) -> ChannelFigures:
        """Figures of the input channels of weights."""
        stats = self.prepared.stats
        assert stats is not None, "a search that reads the channels needs moments"
        return ChannelFigures(checkpoint=self.job.stream.checkpoint, layout=self.job.layout, stats=stats)

    def importance(self) -> Mapping[str, float]:
        """Importance of each block and sub-block to the task."""
        return layer_importance(self.job, self.prepared)

    @cached_property
    def _model(self) -> InMemoryModel:
        return InMemoryModel(self.job.stream, self.job.whole_device)

    @cached_property
    def _damage_probe(self) -> KLProbe:
        assert "_choose_probe" not in self.__dict__, "the model is no longer the original"
        assert self.text.damage is not None
        with self.job.reporter.stage("the original's outputs") as progress:
            probe = KLProbe(self._model, self.text.damage.tokens)
            progress(1, 1)
        _ = self._choose_probe  # both are made while the model is the original
        return probe

    @cached_property
    def _choose_probe(self) -> KLProbe:
        want = self.job.recipe.measure
        assert want is not None
        return KLProbe(self._model, self.text.choose.tokens[:, : want.length], repeated=False)

    def damage(self, background: Background, number: int) -> Measurements:
        """Damage of every choice in a background; what was measured before is reused."""
        job, layout = self.job, self.job.layout
        if job.predicts:
            return self._predicted()
        assert self.text.damage is not None
        probe = self._probe_of_damage()
        key = damage_key(job, self.prepared, background)
        with job.runner.store(key, "damage of each choice" + (f", round {number + 1}" if number else "")) as work:
            found = measure(
                probe, layout, self.candidates, job.space, background, work.folder / "journal.jsonl", job.model,
                self.text.damage.digest, job.seed, work.progress,
            )  # fmt: skip
            save_json(work.folder / "measurements.json", found.model_dump(mode="json"))
        return found

    def _predicted(self) -> Measurements:
        """Damage of every choice, predicted in the dense model, and corrected by what some choices show there."""
        job = self.job
        found = job.runner.run(predicted_stage(job, self.prepared, lambda: self.candidates))
        correction = corrected_stage(job, self.prepared, found, lambda: self.candidates)
        return found if correction is None else job.runner.run(correction)

    def _probe_of_damage(self) -> KLProbe:
        if "_choose_probe" in self.__dict__ and "_damage_probe" not in self.__dict__:
            self.release()
        return self._damage_probe

    def assembled(self, plan: Plan) -> KLProbe:
        """The probe on the rows for choosing between plans, with the plan's candidates in the model."""
        probe = self._choose_probe
        install(probe.whole, self.job.layout, self.candidates, background_of(plan, self.job.layout))
        return probe

    def estimate_kl(self, plan: Plan) -> float:
        """KL of a plan assembled from candidates: no block compensates for the errors of another."""
        return self.assembled(plan).damage(None)

    def apply_and_measure(self, plan: Plan) -> Measured:
        """KL of a plan applied for real; the result is kept, to be written if the plan is chosen."""
        self.release()
        measured = applied(self.job, self.prepared, plan, f"trial of {plan.found_by.method}").measured
        assert measured is not None
        return measured

    def masked(self, config: Any) -> MaskedModel:  # noqa: ANN401
        """The model with a search's two formats in every weight."""
        if self._masked is None or self._masked[0] != config:
            self._masked = config, masked_model(self.job, self.prepared, config)
        return self._masked[1]

    def share_damage(self, config: Any, masks: Mapping[str, Tensor], rows: int) -> float:  # noqa: ANN401
        """KL of the model under masks; kept in a journal."""
        job, text = self.job, self.text
        key = SharesKey(
            masked=job.steps.method.fields(config) | {"quant": plain(job.recipe.quant)},
            moments=moments_key(job, text).digest, train=text.train.digest, device=job.device.type,
        )  # fmt: skip
        journal = Journal(job.runner.cache.store(key.stage, key.digest) / "journal.jsonl")
        name = digest({site: mask.nonzero().flatten().tolist() for site, mask in masks.items()})
        known = {entry["masks"]: entry["kl"] for entry in journal.read()}
        if name not in known:
            known[name] = self.masked(config).damage(masks, rows).kl
            journal.append({"masks": name, "kl": known[name]})
        kl: float = known[name]
        return kl

    def outcomes(self, plans: Sequence[Plan], objective: Objective) -> Iterable[tuple[int, Outcome]]:
        """The index and outcome of each plan, as they become known; `objective.workers` says in how many processes."""
        journal = Journal(self._outcomes_folder(objective) / "journal.jsonl")
        known = {entry["plan"]: Outcome.model_validate(entry["outcome"]) for entry in journal.read()}
        missing = [at for at, plan in enumerate(plans) if plan.content not in known]
        yield from ((at, known[plan.content]) for at, plan in enumerate(plans) if plan.content in known)
        for at, outcome in self._measured([plans[at] for at in missing], objective):
            journal.append({"plan": plans[missing[at]].content, "outcome": outcome.model_dump()})
            yield missing[at], outcome

    def _outcomes_folder(self, objective: Objective) -> Path:
        job, want = self.job, self.job.recipe.measure
        assert want is not None
        folder = Path(objective.data) if objective.data else None
        trained = objective.steps > 0
        key = OutcomesKey(
            moments=moments_key(job, self.text).digest, candidates=candidates_key(job, self.prepared).digest,
            choose=self.text.choose.digest, length=want.length,
            objective=objective.model_dump(mode="json", exclude={"by", "workers", "data"}),
            tasks=task_keys(objective.tasks, folder) if objective.tasks else [],
            tune=result_fields(config_of(job, objective.steps)) if trained else None,
            rows=rows_digest(examples_of(job, self.text)) if trained else None,
        )  # fmt: skip
        return job.runner.cache.store(key.stage, key.digest)

    def _measured(self, plans: Sequence[Plan], objective: Objective) -> Iterator[tuple[int, Outcome]]:
        if objective.workers == 1 or not plans:
            yield from ((at, self.outcome(plan, objective)) for at, plan in enumerate(plans))
            return
        if self._workers is None:
            self._make_shared(objective)
            job = self.job
            self._workers = Workers(
                objective.workers, _open,
                (job.checkpoint.path, job.recipe.model_dump_json(), job.calibration, job.seed, job.runner.cache.root,
                 job.threads, job.device_name, objective.model_dump_json()),
            )  # fmt: skip
        yield from self._workers.each(plans)

    def _make_shared(self, objective: Objective) -> None:
        """Make what all plans share, so that not every process makes it."""
        job = self.job
        if objective.steps:
            teacher_of(job, examples_of(job, self.text), config_of(job, objective.steps))
        else:
            with job.reporter.stage("weights of each choice") as progress:
                self.candidates.make(progress)

    def outcome(self, plan: Plan, objective: Objective) -> Outcome:
        """The figures of a plan that the objective asks for."""
        model, found = self._trained(plan, objective.steps) if objective.steps else self._untrained(plan)
        outcome = Outcome(kl=found.kl, nll=found.nll)
        if not objective.tasks:
            return outcome
        folder = Path(objective.data) if objective.data else None
        scores = score_tasks(
            model, self.job.checkpoint.tokenizer(), objective.tasks, folder=folder, max_documents=objective.documents,
            reporter=self.job.reporter,
        )  # fmt: skip
        mean = mean_score(scores)
        correct = "".join(task.correct for task in scores.values())
        return outcome.model_copy(update={"accuracy": mean.value, "stderr": mean.stderr, "correct": correct})

    def _untrained(self, plan: Plan) -> tuple[PreTrainedModel, Divergence]:
        probe = self.assembled(plan)
        return probe.whole.model, probe.divergence()

    def _trained(self, plan: Plan, steps: int) -> tuple[PreTrainedModel, Divergence]:
        """The model after some steps of recovery; its files are removed, since a search tries many plans."""
        job, prepared = self.job, self.prepared
        stage = applied_stage(job, prepared, plan, f"trial of {plan.found_by.method}")
        known = job.runner.has(stage)
        own = job.runner.run(stage)
        pairs = pairs_stage(job, prepared, plan, own, config_of(job, steps))
        model, found = with_recovered(job, self.text.choose.tokens, own, job.runner.run(pairs))
        job.runner.forget(pairs)
        if not known:
            job.runner.forget(stage)
        return model, found


def problem_of(job: Job, budget_nbytes: int, oracle: ModelOracle | None = None, state: Path | None = None) -> Problem:
    """The search problem of a budget; without an oracle it only serves to count bytes."""
    full = {unit.dim: tuple(range(unit.size)) for unit in job.layout.units.values() if unit.dim is not None}
    return Problem(
        layout=job.layout, model=job.model, budget_nbytes=budget_nbytes, space=job.space,
        rankings=oracle.prepared.rankings if oracle is not None else full,
        recipe=job.recipe.model_dump(mode="json"), calibration=Path(job.calibration).name,
        calibration_digest=oracle.prepared.digest if oracle is not None else None, seed=job.seed,
        measure=job.recipe.measure, oracle=oracle, refits=job.steps.repair is not None, rank=job.rank,
        rotation=job.recipe.rotation, kv_cache=job.recipe.kv_cache, importance=job.steps.importance is not None,
        state=state, reporter=job.reporter,
    )  # fmt: skip


def _open(
    model: Path, recipe: str, calibration: str, seed: int, cache: Path, threads: int, device: str, objective: str
) -> Callable[[Plan], Outcome]:
    """The function by which a worker process measures plans."""
    job = Job(
        checkpoint=open_checkpoint(model), recipe=Recipe.model_validate_json(recipe), calibration=calibration,
        seed=seed, runner=Runner(Cache(cache)), threads=threads, device_name=device,
    )  # fmt: skip
    oracle, want = ModelOracle(job, prepare(job)), Objective.model_validate_json(objective)
    return lambda plan: oracle.outcome(plan, want)
