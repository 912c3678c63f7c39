"""What whole plans are worth on held-out tokens: put together from candidates, applied for real, or trained as well."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from trimbit.evaluate.lm_eval import score_tasks
from trimbit.evaluate.tasks import mean_score
from trimbit.jobs.pool import Workers
from trimbit.measure.choices import background_of
from trimbit.measure.damage import install
from trimbit.measure.kl_probe import KLProbe
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.model.forward.logits import Divergence
from trimbit.pipeline.prepare import Preparation
from trimbit.recover.recovery import recovered
from trimbit.schema.objective import Outcome
from trimbit.schema.plan import Plan
from trimbit.schema.recipe import Recipe


class PlanEvaluator:
    """Judges plans; holds a whole model in memory, or processes that hold one each, until they are released."""

    def __init__(self, prepared: Preparation) -> None:
        self.prepared = prepared
        self.workers: Workers[Plan, Outcome] | None = None

    @cached_property
    def judges(self) -> tuple[KLProbe | None, KLProbe]:
        """KL on the tokens that damage is measured on, and on the held-out ones, by one whole model in memory.

        A search that measures no damage has no first one.
        """
        prepared, want = self.prepared, self.prepared.recipe.measure
        assert want is not None
        tokens, held_out = prepared.tokens.tokens, prepared.held_out.tokens
        whole, first = InMemoryModel(prepared.stream), None
        with prepared.reporter.stage("the model's own output") as progress:
            if hasattr(prepared.search[0], "background"):
                first = KLProbe(whole, tokens[: want.rows, : want.length])
            progress(1, 2)
            second = KLProbe(whole, held_out[:, : want.length], repeated=False)
            progress(2, 2)
        return first, second

    def put_together(self, plan: Plan) -> KLProbe:
        """The judge on held-out tokens, whose model now has the plan's candidates: no block makes up for others."""
        probe, layout = self.judges[1], self.prepared.layout
        install(probe.whole, layout, self.prepared.candidates, background_of(plan, layout))
        return probe

    def evaluate(self, plan: Plan) -> float:
        """KL of a plan put together from candidates: quick."""
        return self.put_together(plan).damage(None)

    def trial(self, plan: Plan) -> float:
        """KL of a plan that is applied for real; it is kept, to be written if it is chosen."""
        self.release()
        return self.prepared.trials.damage(plan)

    def outcome(self, plan: Plan) -> Outcome:
        """What the search's objective wants to know of a plan."""
        prepared, want = self.prepared, self.prepared.objective
        assert want is not None
        model, divergence = self._trained(plan, want.steps) if want.steps else self._as_it_starts(plan)
        found = Outcome(kl=divergence.kl, nll=divergence.nll)
        if not want.tasks:
            return found
        folder = Path(want.data) if want.data else None
        scores = score_tasks(
            model, prepared.checkpoint.tokenizer(), want.tasks, folder=folder, limit=want.documents,
            reporter=prepared.reporter,
        )  # fmt: skip
        mean = mean_score(scores)
        correct = "".join(task.correct for task in scores.values())
        return found.model_copy(update={"accuracy": mean.value, "stderr": mean.stderr, "correct": correct})

    def _as_it_starts(self, plan: Plan) -> tuple[PreTrainedModel, Divergence]:
        probe = self.put_together(plan)
        return probe.whole.model, probe.divergence()

    def _trained(self, plan: Plan, steps: int) -> tuple[PreTrainedModel, Divergence]:
        """What was written for this is removed: a search tries many plans and writes one."""
        trials, recovery = self.prepared.trials, self.prepared.recovery
        known = trials.place(plan).exists()
        folder = trials.applied(plan)
        model = recovered(folder, recovery.train(folder, steps).pairs)
        divergence = recovery.divergence(model)
        recovery.forget(folder, steps)
        if not known:
            trials.forget(plan)
        return model, divergence

    def outcomes(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Outcome]]:
        """The outcome of each plan, with its place among them, as it becomes known; in processes if so asked."""
        prepared, want = self.prepared, self.prepared.objective
        assert want is not None
        if want.workers == 1:
            yield from enumerate(map(self.outcome, plans))
            return
        if self.workers is None:
            self._prepare(want.steps)
            recipe = prepared.recipe.model_dump_json()
            fields = (prepared.checkpoint.path, recipe, prepared.calibration, prepared.seed, prepared.cache)
            self.workers = Workers(want.workers, _open, (*fields, prepared.threads))
        yield from self.workers.each(plans)

    def _prepare(self, steps: int) -> None:
        """Make what all plans share, or each process would."""
        if steps:
            self.prepared.recovery.prepare(steps)
        else:
            with self.prepared.reporter.stage("weights of each choice") as progress:
                self.prepared.candidates.make(progress)

    def release(self) -> None:
        """Let go of the whole model, and of the processes."""
        self.__dict__.pop("judges", None)
        if self.workers is not None:
            self.workers.close()
            self.workers = None


def _open(
    model: Path, recipe: str, calibration: str, seed: int, cache: Path, threads: int
) -> Callable[[Plan], Outcome]:  # fmt: skip
    """What a process of its own judges plans by."""
    checkpoint, read = open_checkpoint(model), Recipe.model_validate_json(recipe)
    return PlanEvaluator(
        Preparation(
            checkpoint=checkpoint, recipe=read, calibration=calibration, seed=seed, cache=cache, threads=threads
        )
    ).outcome  # fmt: skip
