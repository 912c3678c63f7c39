"""Run a recipe for a budget: measurements, search, application, and the directory with all that lies beside it."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trimbit
from trimbit.artifact.card import model_card
from trimbit.artifact.files import RECIPE_FILE, require_absent
from trimbit.artifact.writer import Writer
from trimbit.errors import BudgetError, PlanError
from trimbit.evaluate.lm_eval import check_tasks
from trimbit.evaluate.tasks import task_keys
from trimbit.jobs.cache import save_atomically, source_digest
from trimbit.measure.choices import background_of
from trimbit.measure.damage import measure
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.compute import fastest_device, native
from trimbit.model.sizes import check_kv_cache
from trimbit.pipeline.evaluator import PlanEvaluator
from trimbit.pipeline.prepare import Preparation
from trimbit.recover.recovery import TUNING_FILE, adapter_tensors, recovered, tuning_note, tuning_record
from trimbit.recover.tune import require_peft, result_fields
from trimbit.report import training as learning
from trimbit.report.pareto import Trial, best, picture, require_plot, table
from trimbit.schema.base import digest
from trimbit.schema.budget import Budget
from trimbit.schema.measurements import Background, Measurements
from trimbit.schema.plan import Plan
from trimbit.schema.recipe import Recipe
from trimbit.search.problem import Problem
from trimbit.search.two_formats.config import MaskedSearch
from trimbit.transform.repair.lowrank import require_rank


@dataclass(kw_only=True)
class Session(Preparation):
    """One model, one recipe, one text, one seed, for any number of budgets; its fields are `Preparation`'s."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.judging = PlanEvaluator(self)
        self.curves: dict[str, list[dict[str, float]]] = {}  # of training, by the plan that came of it
        self.tried: dict[str, tuple[int, list[Trial]]] = {}  # by the plan that came of it: the limit, and all trials

    def problem(self, limit: int, *, ready: bool = True) -> Problem:
        """The search problem of a budget; not `ready`: for sizes alone, before anything long."""
        key = self._search_key(limit) if ready and hasattr(self.search[0], "identity") else ""
        empty = {unit.dim: tuple(range(unit.size)) for unit in self.layout.units.values() if unit.dim is not None}
        return Problem(
            layout=self.layout, model=self.model, limit=limit, space=self.space,
            rankings=self.rankings if ready else empty, **self._origin, seed=self.seed,
            evaluate=self.judging.evaluate if ready and self.recipe.measure else None,
            trial=self.judging.trial if ready and self.recipe.measure and self.recipe.measure.apply_finalists else None,
            outcomes=self.judging.outcomes if ready and self.objective else None,
            refit_biases=self.repair is not None, rank=self.rank, rotation=self.recipe.rotation,
            kv_cache=self.recipe.kv_cache, channels=self.channels if ready else None,
            masked=self.masked if ready else None,
            importance=(lambda: self.importance) if self.layers is not None else None,
            reporter=self.reporter, key=key, journal=self.cache / "plans" / f"{key}.jsonl" if key else None,
        )  # fmt: skip

    @property
    def _origin(self) -> dict[str, Any]:
        """What a plan tells of the recipe and the text, so that it can be applied again."""
        return {"recipe": self.recipe.model_dump(mode="json"), "calibration": Path(self.calibration).name}

    def _search_key(self, limit: int) -> str:
        """What decides the result of a trial put together from candidates, and which plans are tried."""
        held_out, measure, objective = self.held_out.digest, self.recipe.measure, self.objective
        want = None if measure is None else measure.length
        module, config = self.search
        weights: object = self.candidates.folder.name
        if isinstance(config, MaskedSearch):
            device = fastest_device().type
            kind = [device, str(native(self.compute, device)), *(["replayed"] if config.cuda_graphs(device) else [])]
            rounding = {
                "rtn": None, "quantizer": self.plain(self.recipe.quant), "expected": self.sweep.model_dump(mode="json"),
            }  # fmt: skip
            weights = [self.training.digest, rounding[config.error_model], self.plain(self.recipe.lowrank), *kind]
        shared = [source_digest(), self.stats_key, weights, held_out, want]
        steps = [module.result_fields(config), self.plain(self.recipe.importance), self.space.model_dump(mode="json")]
        if objective is not None and objective.steps:
            assert self.tuning is not None
            steps += [result_fields(self.tuning.model_copy(update={"steps": objective.steps})), self.recovery.rows]
        if objective is not None and objective.tasks:
            steps.append(task_keys(objective.tasks, Path(objective.data) if objective.data else None))
        return digest([*shared, limit, self.seed, self.rankings, *steps])

    def limit(self, budget: Budget | None) -> int:
        """A budget in bytes, checked to be feasible; without one, what the recipe itself asks for.

        Raises:
            BudgetError: if it is not feasible, naming the smallest that is; or if there is none.
            LayoutError: if the recipe asks for a rotation that the model's norms do not allow.
            PlanError: if the recipe asks for a cache or a rotation that the model cannot have.
            RecipeError: if its low-rank pairs do not fit a weight, or something to install is missing.
        """
        module, config = self.search
        self.require_rotatable()
        check_kv_cache(self.recipe.kv_cache, self.layout.config)
        if hasattr(module, "trials") or hasattr(module, "curve"):
            require_plot()
        for weight in self.layout.weights.values() if self.rank else ():
            unit = self.layout.units[weight.unit]
            if unit.block is not None:
                require_rank(self.rank, *self.layout.weight_shape(weight, self.space.kept.get(unit.dim or "")))
        self._check_training()
        if self.objective is not None and self.objective.tasks:
            folder = self.objective.data
            check_tasks(self.objective.tasks, Path(folder) if folder else None, self.objective.documents)
        if budget is None and not hasattr(module, "default_limit"):
            raise BudgetError(f"search {self.recipe.search.name} needs a budget: give --budget, such as 0.3x")
        if budget is None:
            limit: int = module.default_limit(self.problem(0, ready=False), config)
        else:
            limit = budget.nbytes(self.layout.parameters)
        module.require_feasible(self.problem(limit, ready=False), config)
        return limit

    def _check_training(self) -> None:
        """Refuse, before anything long, to train without PEFT or on data that cannot be read."""
        if self.tuning is not None:
            require_peft()
            if self.tuning.data is not None:
                _ = self.examples

    def find_plan(self, budget: Budget | None) -> Plan:
        """Search the best plan within a budget; None: the recipe's own."""
        try:
            return self._find_plan(self.limit(budget))
        finally:
            self.judging.release()
            self._masked = None

    def _find_plan(self, limit: int) -> Plan:
        module, config = self.search
        problem = self.problem(limit)
        want = self.recipe.measure
        if not hasattr(module, "background") or want is None:
            with self.reporter.stage("search") as progress:
                plan: Plan = module.search(problem, config)
                progress(1, 1)
            if hasattr(module, "trials"):
                self.tried[plan.content] = limit, [Trial(*one) for one in module.trials(problem, config)]
            if hasattr(module, "curve"):
                self.curves[plan.content] = module.curve(problem, config)
            return plan
        background: Background = module.background(problem, config)
        plans: list[Plan] = []
        for number in range(want.rounds):
            measurements = self.measure(background, number)
            with self.reporter.stage("search") as progress:
                key = digest(measurements.model_dump(mode="json"))
                solved = replace(problem, measurements=measurements, measurement_hash=key)
                plans.append(module.search(solved, config))
                progress(1, 1)
            background = background_of(plans[-1], self.layout)
        return problem.best(plans)[0]

    def measure(self, background: Background, number: int) -> Measurements:
        """Damage of every choice in a background; a stored measurement is reused, a broken-off one goes on."""
        space, probe = self.space, self.judging.judges[0]
        assert probe is not None
        key = digest(
            [
                self.stats_key,
                self.candidates.folder.name,
                background.model_dump(mode="json"),
                self.kept(background.widths),
                list(probe.tokens.shape),
            ]
        )
        journal = self.cache / "measurements" / f"{key}.jsonl"
        with self.reporter.stage("damage of each choice" + (f", round {number + 1}" if number else "")) as progress:
            found = measure(
                probe, self.layout, self.candidates, space, background, journal,
                self.model, self.tokens.digest, self.seed, progress,
            )  # fmt: skip
        path = self.cache / "measurements" / f"{digest(found.model_dump(mode='json'))}.json"
        save_atomically(path, lambda beside: beside.write_text(found.model_dump_json(), encoding="utf-8"))
        return found

    def write(self, plan: Plan, out: Path) -> Plan:
        """Apply a plan and write the compressed directory; the plan that it holds says what was measured.

        Raises:
            PlanError: if the plan belongs to another model.
        """
        if (plan.model.config_hash, plan.model.weights_hash) != (self.model.config_hash, self.model.weights_hash):
            raise PlanError(
                f"the plan belongs to {plan.model.id} (weights {plan.model.weights_hash[:12]}), "
                f"not to {self.model.id} (weights {self.model.weights_hash[:12]})"
            )
        self.layout.check(plan)
        self._check_recipe(plan)
        self._check_training()
        plan = plan.with_provenance(nbytes=self.layout.file_nbytes(plan), **self._origin, seed=self.seed)
        with Writer(out, self.layout, plan) as writer:
            if self.tuning is not None:
                self._tune(plan, writer)
            elif self.measures_plans and self.trials.place(plan).exists():
                writer.take(self.trials.place(plan))
            else:
                self.trials.write(plan, writer, "pruning, refit, quantisation")
            self._beside(writer.plan, writer)
        return writer.plan

    def _check_recipe(self, plan: Plan) -> None:
        """Refuse a plan that this recipe has no means to apply."""
        advice = "apply it with the recipe that found it (--recipe)"
        if plan.adapters and self.lowrank is None:
            raise PlanError(f"the plan has low-rank pairs, but the recipe has no `lowrank`: {advice}")
        if self.tuning is not None and not plan.adapters:
            raise PlanError(f"the recipe trains low-rank pairs, but the plan has none: {advice}")
        if plan.rotation != self.recipe.rotation:
            raise PlanError(f"the plan's rotation is {plan.rotation}, the recipe's {self.recipe.rotation}: {advice}")
        if plan.biases and (self.repair is None or self.stats is None):
            raise PlanError(f"the plan refits {len(plan.biases)} weights, but the recipe fits nothing: {advice}")

    def _tune(self, plan: Plan, writer: Writer) -> None:
        """Apply a plan, train its low-rank pairs, and fill `writer` with the result."""
        folder = self.trials.applied(plan)
        tuned = self.recovery.train(folder)
        writer.take(folder, adapter_tensors(tuned.pairs))
        writer.write(TUNING_FILE, tuning_record(tuned))
        divergence = self.recovery.divergence(recovered(folder, tuned.pairs))
        before = writer.plan.found_by
        notes = (*before.notes, tuning_note(tuned, before.measured_damage))
        writer.plan = writer.plan.with_provenance(measured_damage=divergence.kl, notes=notes)

    def _beside(self, plan: Plan, writer: Writer) -> None:
        """The files beside the weights: tokenizer, templates, licence, recipe, model card."""
        writer.write(RECIPE_FILE, self.recipe.to_yaml())
        limit, tried = self.tried.get(plan.content, (0, []))
        if tried:
            writer.write("trials.csv", table(tried))
            writer.write("trials.png", picture(tried, limit))
            for at in best(tried):
                tried[at].plan.save(writer.partial / "pareto" / f"trial-{at + 1}.json")
        c = self.checkpoint
        if plan.content in self.curves:
            curve, high = self.curves[plan.content], self.search[1].high
            writer.write("training.csv", learning.table(curve))
            writer.write("training.png", learning.picture(self.layout, plan, high, curve))
        writer.write(
            "README.md", model_card(trimbit.__version__, c.model_id, c.license, self.layout, plan, self.calibration)
        )
        sidecars = self.checkpoint.sidecars()
        for path in sidecars:
            target = writer.partial / path.relative_to(self.checkpoint.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        if not any(path.name.startswith("tokenizer") for path in sidecars):
            self.checkpoint.tokenizer().save_pretrained(writer.partial)


def open_session(model: str | Path, recipe: Recipe, **fields: Any) -> Session:  # noqa: ANN401
    """Open a model for a recipe; see `Preparation` for the fields."""
    return Session(checkpoint=open_checkpoint(model), recipe=recipe, **fields)


def compress(session: Session, budget: Budget | None, out: Path) -> Plan:
    """The main job: find the best plan within the budget, apply it, write the directory."""
    require_absent(out)
    return session.write(session.find_plan(budget), out)
