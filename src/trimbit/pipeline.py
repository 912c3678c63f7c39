"""Run a recipe: text, statistics, rankings, measurements, search, application; each stage is cached by its content."""

import importlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import trimbit
from trimbit import data
from trimbit.apply import Method, cut_unit
from trimbit.artifact import RECIPE_FILE, Writer, model_card, require_absent
from trimbit.cache import cache_root, save_whole, source_digest
from trimbit.candidates import CandidateWeights
from trimbit.errors import BudgetError, DataError, PlanError, RecipeError
from trimbit.information import layer_information
from trimbit.instructions import from_instructions, from_rows
from trimbit.measure import background_of, install, measure
from trimbit.measurements import Background, Measurements, Objective, Outcome, Space
from trimbit.model.checkpoint import Checkpoint
from trimbit.model.layout import Layout, build_layout
from trimbit.model.load import open_checkpoint
from trimbit.model.stream import BlockStream
from trimbit.model.whole import Judge, WholeModel
from trimbit.pareto import Trial, picture, require_plot, table
from trimbit.plan import Budget, ModelRef, Plan, digest
from trimbit.progress import Reporter, Silent
from trimbit.prune import kept_widths, protected
from trimbit.ranking import by_gradients, by_moments
from trimbit.recipe import Recipe, Step, step_config
from trimbit.recovery import TUNING_FILE, Recovery, adapter_tensors, recovered, tuning_record
from trimbit.repair.tune import Config as Tuning
from trimbit.repair.tune import Example, require_peft
from trimbit.search.problem import Problem
from trimbit.stats import Stats, collect, stored
from trimbit.tasks import check_tasks, mean_score, score_tasks, task_keys
from trimbit.trials import Trials
from trimbit.workers import Workers


def module_of(stage: str, step: Step) -> ModuleType:
    """The module of a stage by its name.

    Raises:
        RecipeError: if there is none.
    """
    try:
        return importlib.import_module(f"trimbit.{stage}.{step.name}")
    except ModuleNotFoundError as err:
        raise RecipeError(f"no {stage} method {step.name!r}: there is no module trimbit.{stage}.{step.name}") from err


@dataclass(kw_only=True)
class Session:
    """One model, one recipe, one text, one seed: everything that budgets share, computed once when first needed."""

    checkpoint: Checkpoint
    recipe: Recipe
    calibration: str = "self"  # or a file
    seed: int = 0
    reporter: Reporter = field(default_factory=Silent)
    cache: Path = field(default_factory=cache_root)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.quant = self._module("quant", recipe.quant, "quantize")
        self.search = self._module("search", recipe.search, "search")
        self.criterion = self._module("criteria", recipe.criterion, "score") if recipe.criterion else None
        self.layers = self._module("criteria", recipe.importance, "information") if recipe.importance else None
        self.repair = self._module("repair", recipe.repair, "refit") if recipe.repair else None
        self.lowrank = self._module("repair", recipe.lowrank, "correct")[1] if recipe.lowrank else None
        self.tuning: Tuning | None = self._module("repair", recipe.tune, "tune")[1] if recipe.tune else None
        self.searched: Problem | None = None  # the last problem that was solved
        self.workers: Workers | None = None
        self.compute: torch.dtype = getattr(torch, recipe.compute)
        if self.tuning is not None and self.lowrank is None:
            raise RecipeError("`tune` trains low-rank pairs: the recipe needs a `lowrank` too")
        if self.tuning is not None and self.tuning.loss == "instruct" and self.tuning.data is None:
            raise RecipeError("tune.loss instruct needs tune.data, a .jsonl file with `instruction` and `output`")
        for field_name in self.search[0].NEEDS:
            if getattr(recipe, field_name) is None:
                raise RecipeError(f"search {recipe.search.name} needs a `{field_name}` in the recipe")
        if recipe.prune is not None and recipe.criterion is None:
            raise RecipeError("`prune` needs a `criterion` in the recipe, to say what goes first")
        if self.calibration != "self" and not Path(self.calibration).is_file():
            raise DataError(f"no calibration text {self.calibration!r}: give `self` or a file")

    def _module(self, stage: str, step: Step, offers: str) -> tuple[ModuleType, Any]:
        module = module_of(stage, step)
        if not hasattr(module, offers):
            raise RecipeError(f"{stage} {step.name} cannot stand here: it does not offer `{offers}`")
        return module, step_config(module.Config, stage, step)

    @cached_property
    def layout(self) -> Layout:
        """The structure of the model."""
        return build_layout(self.checkpoint.config)

    @cached_property
    def model(self) -> ModelRef:
        """What ties plans and measurements to the model."""
        c = self.checkpoint
        return ModelRef(id=c.model_id, config_hash=c.config_hash(), weights_hash=c.weights_hash())

    @cached_property
    def stream(self) -> BlockStream:
        """The dense model, block by block."""
        return BlockStream(self.checkpoint, self.layout, self.compute)

    @cached_property
    def tokens(self) -> data.TokenSet:
        """The calibration tokens."""
        return self._text[0]

    @cached_property
    def held_out(self) -> data.TokenSet:
        """Tokens of the same text that nothing is fitted to."""
        return self._text[1]

    @cached_property
    def _text(self) -> tuple[data.TokenSet, data.TokenSet]:
        want = self.recipe.calibration
        rows, length, tokenizer = want.rows + want.held_out, want.length, self.checkpoint.tokenizer()
        if self.calibration == "self":
            return self._sampled(tokenizer, rows, length).split(want.held_out)
        try:
            found = data.from_file(Path(self.calibration), tokenizer, rows=rows, length=length, seed=self.seed)
        except DataError as err:
            raise DataError(f"{err} (rows are calibration.rows + calibration.held_out)") from err
        return found.split(want.held_out)

    def _sampled(self, tokenizer: Any, rows: int, length: int) -> data.TokenSet:  # noqa: ANN401
        """Text of the model's own, sampled once."""
        key = digest(
            [
                trimbit.__version__,
                self.model.weights_hash,
                self.recipe.compute,
                rows,
                length,
                self.seed,
                torch.get_num_threads(),
            ]
        )
        path = self.cache / "tokens" / f"{key}.safetensors"
        if path.exists():
            return data.TokenSet(name="self", tokens=load_file(path)["tokens"], seed=self.seed)
        with self.reporter.stage("text sampled from the model") as progress:
            model = WholeModel(self.stream).model
            found = data.sample_self(model, tokenizer, rows=rows, length=length, seed=self.seed, progress=progress)
        save_whole(path, lambda beside: save_file({"tokens": found.tokens}, beside))
        return found

    @cached_property
    def stats_key(self) -> str:
        """Content key of the statistics."""
        return digest(
            [
                trimbit.__version__,
                self.model.weights_hash,
                self.model.config_hash,
                self.tokens.digest,
                self.recipe.compute,
            ]
        )

    @property
    def _needs_moments(self) -> bool:
        ranks = self.criterion is not None and self.criterion[0].READS == "moments"
        refits = self.criterion is not None and self.repair is not None
        return self.method.needs_moments or ranks or refits

    @cached_property
    def stats(self) -> Stats | None:
        """Moments of the dense model, where any stage needs them."""
        if not self._needs_moments:
            return None
        tokens, folder = self.tokens.tokens, self.cache / "stats" / self.stats_key
        known = stored(folder, self.layout.blocks, tokens.numel())
        if known is not None:
            return known
        stream = self.stream
        with self.reporter.stage("statistics") as progress:
            return collect(stream, tokens, folder, progress)

    @cached_property
    def rankings(self) -> dict[str, tuple[int, ...]]:
        """For each dim, its indices, the one to keep longest first."""
        if self.criterion is None:
            return {}
        module, config = self.criterion
        path = self.cache / "rankings" / f"{digest([self.stats_key, self._step(self.recipe.criterion)])}.json"
        if path.exists():
            return {dim: tuple(order) for dim, order in json.loads(path.read_text(encoding="utf-8")).items()}
        with self.reporter.stage("ranking of channels and heads") as progress:
            if module.READS == "moments":
                assert self.stats is not None
                found = by_moments(module, config, self.layout, self.checkpoint, self.stats, progress)
            else:
                found = by_gradients(module, config, self.stream, self.tokens.tokens, progress)
        save_whole(path, lambda beside: beside.write_text(json.dumps(found), encoding="utf-8"))
        return found

    @cached_property
    def importance(self) -> dict[str, float]:
        """The importance of each block and sub-block of the pruned model to the task."""
        assert self.layers is not None
        steps = [self._step(self.recipe.importance)]
        decides = [source_digest("criteria", "information.py"), self.stats_key, *steps, self._kept(self.space.kept)]
        path = self.cache / "importance" / f"{digest(decides)}.json"
        if path.exists():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        with self.reporter.stage("importance of each layer") as progress:
            found = layer_information(self.stream, self._pruned, self.tokens.tokens, self.layers[1], progress)
        save_whole(path, lambda beside: beside.write_text(json.dumps(found), encoding="utf-8"))
        return found

    def _kept(self, widths: Mapping[str, int]) -> dict[str, list[int]]:
        """The members of each dim that a width keeps."""
        return {dim: sorted(self.rankings[dim][:width]) for dim, width in widths.items()}

    def _pruned(self, index: int) -> nn.Module:
        """A block with the widths that are fixed before the search."""
        block = self.stream.load(index)
        for unit in self.layout.units.values():
            width = self.space.kept.get(unit.dim or "")
            if unit.block == index and unit.dim is not None and width is not None:
                keep = tuple(sorted(self.rankings[unit.dim][:width]))
                cut_unit(block, self.layout, unit, keep, f"{self.layout.family.blocks}.{index}.")
        return block

    def _step(self, step: Step | None) -> dict[str, Any] | None:
        return step.model_dump(mode="json") if step else None

    @property
    def method(self) -> Method:
        """How a weight is compressed."""
        return Method(module=self.quant[0], config=self.quant[1], pairs=self.lowrank, seed=self.seed)

    @property
    def rank(self) -> int:
        """Of the low-rank pair beside each weight of the blocks; 0: none."""
        return self.lowrank.rank if self.lowrank is not None else 0

    @cached_property
    def space(self) -> Space:
        """What the search may choose from, with what is fixed before it."""
        space = self.recipe.space or Space(formats=(), table_formats=())
        if self.recipe.prune is None:
            return space
        fixed = {
            "kept": kept_widths(self.layout, self.recipe.prune),
            "spared": protected(self.layout, self.recipe.prune),
        }
        return space.model_copy(update=fixed)

    @cached_property
    def candidates(self) -> CandidateWeights:
        """The weights of every choice."""
        recipe = self.recipe
        source = self.stats_key if self.stats is not None else self.model.weights_hash
        steps = [self._step(step) for step in (recipe.quant, recipe.repair, recipe.lowrank)]
        code = source_digest("quant", "kernels", "repair", "candidates.py", "apply.py")
        key = digest([code, source, *steps, self.seed if self.rank else 0])
        return CandidateWeights(
            self.checkpoint,
            self.layout,
            self.stats,
            self.method,
            self.cache / "candidates" / key,
            self.rankings,
            self.space,
            rank=self.rank,
            refits=self.repair is not None,
        )

    @cached_property
    def judges(self) -> tuple[Judge | None, Judge]:
        """KL on the tokens that damage is measured on, and on the held-out ones, by one whole model in memory.

        A search that measures no damage has no first one.
        """
        want = self.recipe.measure
        assert want is not None
        if len(self.tokens.tokens) < want.rows:
            raise RecipeError(f"measure.rows: {want.rows} of {len(self.tokens.tokens)} calibration rows asked")
        whole, first = WholeModel(self.stream), None
        with self.reporter.stage("the model's own output") as progress:
            if hasattr(self.search[0], "background"):
                first = Judge(whole, self.tokens.tokens[: want.rows, : want.length])
            progress(1, 2)
            second = Judge(whole, self.held_out.tokens[:, : want.length], repeated=False)
            progress(2, 2)
        return first, second

    def _put_together(self, plan: Plan) -> Judge:
        judge = self.judges[1]
        install(judge.whole, self.layout, self.candidates, background_of(plan, self.layout))
        return judge

    def evaluate(self, plan: Plan) -> float:
        """KL on held-out tokens of a plan put together from candidates: quick, but no block makes up for others."""
        return self._put_together(plan).damage(None)

    @cached_property
    def trials(self) -> Trials:
        """Plans applied for real."""
        steps = (self.recipe.quant, self.recipe.repair, self.recipe.lowrank)
        judged = self.held_out if self._judges else None
        decides = (
            self.stats_key if judged else self.model.weights_hash, judged.digest if judged else None,
            *(self._step(step) for step in steps), self.seed if self.rank else 0,
        )  # fmt: skip
        return Trials(
            stream=self.stream, method=self.method, repair=self.repair[1] if self.repair else None, stats=self.stats,
            tokens=self.tokens.tokens if self.stats is not None else None, held_out=judged.tokens if judged else None,
            folder=self.cache / "trials", decides=decides, reporter=self.reporter,
        )  # fmt: skip

    def trial(self, plan: Plan) -> float:
        """KL on held-out tokens of a plan that is applied for real; it is kept, to be written if it is chosen."""
        self._release()
        return self.trials.damage(plan)

    @property
    def objective(self) -> Objective | None:
        """What a search by trials goes by."""
        return getattr(self.search[1], "objective", None)

    def outcome(self, plan: Plan) -> Outcome:
        """What the search's objective wants to know of a plan: put together from candidates, or after recovery."""
        want = self.objective
        assert want is not None
        if want.steps:
            folder = self.trials.applied(plan)
            model = recovered(folder, self.recovery.train(folder, want.steps).pairs)
            judged = self.recovery.judged(model)
        else:
            judge = self._put_together(plan)
            model, judged = judge.whole.model, judge.judged()
        found = Outcome(kl=judged.kl, nll=judged.nll)
        if not want.tasks:
            return found
        scores = score_tasks(
            model, self.checkpoint.tokenizer(), want.tasks, folder=Path(want.data) if want.data else None,
            limit=want.documents, reporter=self.reporter,
        )  # fmt: skip
        mean = mean_score(scores)
        return found.model_copy(update={"accuracy": mean.value, "stderr": mean.stderr})

    def outcomes(self, plans: Sequence[Plan]) -> Iterator[Outcome]:
        """The outcome of each plan, in their order; in processes of their own if the objective asks for several."""
        want = self.objective
        assert want is not None
        if want.workers == 1:
            yield from map(self.outcome, plans)
            return
        if self.workers is None:
            _ = self.rankings, self.stats, self.held_out  # cached before, or each process would make them
            self.workers = Workers(self, want.workers)
        yield from self.workers.outcomes(plans)

    @property
    def _judges(self) -> bool:
        """Whether there is text to say what a plan costs: a recipe that neither fits nor measures needs none."""
        return self.stats is not None or self.recipe.measure is not None or self.tuning is not None

    def _release(self) -> None:
        """Let go of the whole model: what follows streams block by block."""
        self.__dict__.pop("judges", None)
        self.__dict__.pop("candidates", None)

    def problem(self, limit: int, *, ready: bool = True) -> Problem:
        """The search problem of a budget; not `ready`: for sizes alone, before anything long."""
        key = self._search_key(limit) if ready and hasattr(self.search[0], "trials") else ""
        empty = {unit.dim: tuple(range(unit.size)) for unit in self.layout.units.values() if unit.dim is not None}
        return Problem(
            layout=self.layout, model=self.model, limit=limit, space=self.space,
            rankings=self.rankings if ready else empty, recipe_hash=self.recipe.hash, seed=self.seed,
            evaluate=self.evaluate if ready and self.recipe.measure else None,
            trial=self.trial if ready and self.recipe.measure and self.recipe.measure.trials else None,
            outcomes=self.outcomes if ready and self.objective else None,
            refit_biases=self.repair is not None, rank=self.rank,
            importance=(lambda: self.importance) if self.layers is not None else None,
            reporter=self.reporter, key=key, journal=self.cache / "plans" / f"{key}.jsonl" if key else None,
        )  # fmt: skip

    def _search_key(self, limit: int) -> str:
        """What decides the result of a trial put together from candidates, and which plans are tried."""
        held_out, measure, objective = self.held_out.digest, self.recipe.measure, self.objective
        want = None if measure is None else measure.length
        module, config = self.search
        decides = [self.stats_key, self.candidates.folder.name, held_out, want, limit, self.seed, self.rankings]
        steps = [module.identity(config), self._step(self.recipe.importance), self.space.model_dump(mode="json")]
        if objective is not None and objective.steps:
            steps += [self._step(self.recipe.tune), self.recovery.rows]
        if objective is not None and objective.data is not None:
            steps.append(task_keys(objective.tasks, Path(objective.data)))
        return digest([*decides, *steps])

    def limit(self, budget: Budget | None) -> int:
        """A budget in bytes, checked to be feasible; without one, what the recipe itself asks for.

        Raises:
            BudgetError: if it is not feasible, naming the smallest that is; or if there is none.
        """
        module, config = self.search
        if hasattr(module, "trials"):
            require_plot()
        if self.tuning is not None:
            require_peft()
            if self.tuning.data is not None:
                _ = self.examples
        if self.objective is not None and self.objective.tasks:
            folder = self.objective.data
            check_tasks(self.objective.tasks, Path(folder) if folder else None, self.objective.documents)
        if budget is None and not hasattr(module, "default_limit"):
            raise BudgetError(f"search {self.recipe.search.name} needs a budget: give --budget, such as 0.3x")
        if budget is None:
            limit: int = module.default_limit(self.problem(0, ready=False), config)
            return limit
        limit = budget.nbytes(self.layout.parameters)
        module.require_feasible(self.problem(limit, ready=False), config)
        return limit

    def find_plan(self, budget: Budget | None) -> Plan:
        """Search the best plan within a budget; None: the recipe's own."""
        try:
            return self._find_plan(self.limit(budget))
        finally:
            if self.workers is not None:
                self.workers.close()
                self.workers = None

    def _find_plan(self, limit: int) -> Plan:
        module, config = self.search
        self.searched = problem = self.problem(limit)
        want = self.recipe.measure
        if not hasattr(module, "background") or want is None:
            with self.reporter.stage("search") as progress:
                plan: Plan = module.search(problem, config)
                progress(1, 1)
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
        space, judge = self.space, self.judges[0]
        assert judge is not None
        key = digest(
            [
                self.stats_key,
                self.candidates.folder.name,
                background.model_dump(mode="json"),
                self._kept(background.widths),
                list(judge.tokens.shape),
            ]
        )
        journal = self.cache / "measurements" / f"{key}.jsonl"
        with self.reporter.stage("damage of each choice" + (f", round {number + 1}" if number else "")) as progress:
            found = measure(
                judge, self.layout, self.candidates, space, background, journal,
                self.model, self.tokens.digest, self.seed, progress,
            )  # fmt: skip
        path = self.cache / "measurements" / f"{digest(found.model_dump(mode='json'))}.json"
        save_whole(path, lambda beside: beside.write_text(found.model_dump_json(), encoding="utf-8"))
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
        self._release()
        with Writer(out, self.layout, plan) as writer:
            if self.tuning is not None:
                self._tune(plan, writer)
            elif self._judges and self.trials.place(plan).exists():
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
        if plan.biases and (self.repair is None or self.stats is None):
            raise PlanError(f"the plan refits {len(plan.biases)} weights, but the recipe fits nothing: {advice}")

    def _tune(self, plan: Plan, writer: Writer) -> None:
        """Apply a plan, train its low-rank pairs, and fill `writer` with the result."""
        folder = self.trials.applied(plan)
        tuned = self.recovery.train(folder)
        writer.take(folder, adapter_tensors(tuned.pairs))
        writer.write(TUNING_FILE, tuning_record(tuned))
        judged = self.recovery.judged(recovered(folder, tuned.pairs))
        found = writer.plan.found_by.model_copy(update={"measured_damage": judged.kl})
        writer.plan = writer.plan.model_copy(update={"found_by": found})

    @cached_property
    def recovery(self) -> Recovery:
        """Training of what plans leave of this model."""
        assert self.tuning is not None
        answers = digest([self.model.weights_hash, self.recipe.compute, trimbit.__version__])
        return Recovery(
            stream=self.stream, config=self.tuning, examples=self.examples, held_out=self.held_out.tokens,
            seed=self.seed, originals=self.cache / "originals" / answers, states=self.cache / "tuned",
            reporter=self.reporter,
        )  # fmt: skip

    @cached_property
    def examples(self) -> list[Example]:
        """What recovery trains on."""
        assert self.tuning is not None
        if self.tuning.data is None:
            return from_rows(self.tokens.tokens, self.checkpoint.tokenizer(), self.tuning.length)
        tokenizer, masked = self.checkpoint.tokenizer(), self.tuning.loss == "instruct"
        return from_instructions(Path(self.tuning.data), tokenizer, self.tuning.length, masked=masked)

    def _beside(self, plan: Plan, writer: Writer) -> None:
        """The files beside the weights: tokenizer, templates, licence, recipe, model card."""
        writer.write(RECIPE_FILE, self.recipe.to_yaml())
        module, config = self.search
        if self.searched is not None and hasattr(module, "trials"):
            tried = [Trial(*one) for one in module.trials(self.searched, config)]
            writer.write("trials.csv", table(tried))
            writer.write("trials.png", picture(tried, self.searched.limit))
        c = self.checkpoint
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
    """Open a model for a recipe; see `Session` for the fields."""
    return Session(checkpoint=open_checkpoint(model), recipe=recipe, **fields)


def compress(session: Session, budget: Budget | None, out: Path) -> Plan:
    """The main job: find the best plan within the budget, apply it, write the directory."""
    require_absent(out)
    return session.write(session.find_plan(budget), out)
