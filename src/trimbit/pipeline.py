"""Run a recipe: text, statistics, rankings, measurements, search, application; each stage is cached by its content."""

import importlib
import json
import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimbit
from trimbit import data
from trimbit.apply import Method, apply_plan
from trimbit.artifact import PLAN_FILE, RECIPE_FILE, Writer, model_card, require_absent
from trimbit.cache import cache_root, save_whole, source_digest
from trimbit.candidates import CandidateWeights
from trimbit.errors import ArtifactError, DataError, PlanError, RecipeError
from trimbit.measure import background_of, install, measure
from trimbit.measurements import Background, Measurements, Space
from trimbit.model.checkpoint import Checkpoint
from trimbit.model.layout import Layout, build_layout
from trimbit.model.load import open_checkpoint
from trimbit.model.stream import BlockStream
from trimbit.model.whole import Judge, WholeModel
from trimbit.plan import Budget, ModelRef, Plan, digest, load_plan
from trimbit.progress import Reporter, Silent
from trimbit.recipe import Recipe, Step, step_config
from trimbit.search.problem import Problem
from trimbit.stats import Stats, collect, stored


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
        self.quant = self._module("quant", recipe.quant)
        self.search = self._module("search", recipe.search)
        self.criterion = self._module("criteria", recipe.criterion) if recipe.criterion else None
        self.repair = self._module("repair", recipe.repair)
        self.compute: torch.dtype = getattr(torch, recipe.compute)
        if self.search[0].NEEDS_MEASUREMENTS and (recipe.space is None or recipe.measure is None):
            raise RecipeError(f"search {recipe.search.name} needs a `space` to choose from and a `measure`")
        if self.calibration != "self" and not Path(self.calibration).is_file():
            raise DataError(f"no calibration text {self.calibration!r}: give `self` or a file")

    def _module(self, stage: str, step: Step) -> tuple[ModuleType, Any]:
        module = module_of(stage, step)
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

    @cached_property
    def stats(self) -> Stats | None:
        """Moments of the dense model, where any stage needs them."""
        if not self.quant[0].NEEDS_MOMENTS and self.criterion is None:
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
        assert self.stats is not None
        found: dict[str, tuple[int, ...]] = {}
        units = [unit for unit in self.layout.units.values() if unit.dim is not None]
        with self.reporter.stage("ranking of channels and heads") as progress:
            for at, unit in enumerate(units):
                assert unit.out_weight is not None
                weight = self.layout.weights[unit.out_weight]
                w = self.checkpoint.tensor(f"{weight.name}.weight").float()
                scores: Tensor = module.score(w, self.stats.moments(weight.site), weight.cols // unit.size, config)
                found[unit.dim or ""] = tuple(scores.argsort(descending=True, stable=True).tolist())
                progress(at + 1, len(units))
        save_whole(path, lambda beside: beside.write_text(json.dumps(found), encoding="utf-8"))
        return found

    def _step(self, step: Step | None) -> dict[str, Any] | None:
        return step.model_dump(mode="json") if step else None

    @property
    def method(self) -> Method:
        """The quantiser."""
        return Method(module=self.quant[0], config=self.quant[1])

    @cached_property
    def candidates(self) -> CandidateWeights:
        """The weights of every choice."""
        key = digest(
            [self.stats_key if self.stats is not None else self.model.weights_hash, self._step(self.recipe.quant)]
        )
        return CandidateWeights(
            self.checkpoint,
            self.layout,
            self.stats,
            self.method,
            self.cache / "candidates" / key,
            self.rankings,
            self.recipe.space,
        )

    @cached_property
    def judges(self) -> tuple[Judge, Judge]:
        """KL on the tokens that damage is measured on, and on the held-out ones, by one whole model in memory."""
        want = self.recipe.measure
        assert want is not None
        if len(self.tokens.tokens) < want.rows:
            raise RecipeError(f"measure.rows: {want.rows} of {len(self.tokens.tokens)} calibration rows asked")
        whole = WholeModel(self.stream)
        with self.reporter.stage("the model's own output") as progress:
            first = Judge(whole, self.tokens.tokens[: want.rows, : want.length])
            progress(1, 2)
            second = Judge(whole, self.held_out.tokens[:, : want.length], repeated=False)
            progress(2, 2)
        return first, second

    def evaluate(self, plan: Plan) -> float:
        """KL on held-out tokens of a plan put together from candidates: quick, but no block makes up for others."""
        judge = self.judges[1]
        install(judge.whole, self.layout, self.candidates, background_of(plan, self.layout))
        return judge.damage(None)

    def trial(self, plan: Plan) -> float:
        """KL on held-out tokens of a plan that is applied for real; it is kept, to be written if it is chosen."""
        folder = self._trial_folder(plan)
        if not folder.exists():
            self._release()
            try:
                with Writer(folder, self.layout, plan) as writer:
                    self._apply(plan, writer, f"trial of {plan.found_by.method}")
            except ArtifactError:
                if not folder.exists():  # else another run has tried the same plan meanwhile
                    raise
        measured = load_plan(folder / PLAN_FILE).found_by.measured_damage
        assert measured is not None
        return measured

    def _trial_folder(self, plan: Plan) -> Path:
        decides = [
            source_digest(),
            self.stats_key,
            self.held_out.digest,
            self._step(self.recipe.quant),
            self._step(self.recipe.repair),
            plan.model_dump(mode="json", exclude={"found_by"}),
        ]
        return self.cache / "trials" / digest(decides)

    @property
    def _judges(self) -> bool:
        """Whether there is text to say what a plan costs: a recipe that neither fits nor measures needs none."""
        return self.stats is not None or self.recipe.measure is not None

    def _release(self) -> None:
        """Let go of the whole model: what follows streams block by block."""
        self.__dict__.pop("judges", None)
        self.__dict__.pop("candidates", None)

    def problem(self, limit: int, *, ready: bool = True) -> Problem:
        """The search problem of a budget; not `ready`: for sizes alone, before anything long."""
        space = self.recipe.space or Space(formats=(), table_formats=())
        empty = {unit.dim: tuple(range(unit.size)) for unit in self.layout.units.values() if unit.dim is not None}
        return Problem(
            layout=self.layout, model=self.model, limit=limit, space=space, rankings=self.rankings if ready else empty,
            recipe_hash=self.recipe.hash, seed=self.seed,
            evaluate=self.evaluate if ready and self.recipe.measure else None,
            trial=self.trial if ready and self.recipe.measure and self.recipe.measure.trials else None,
        )  # fmt: skip

    def limit(self, budget: Budget) -> int:
        """A budget in bytes, checked to be feasible.

        Raises:
            BudgetError: if it is not; names the smallest feasible one.
        """
        limit = budget.nbytes(self.layout.parameters)
        module, config = self.search
        module.require_feasible(self.problem(limit, ready=False), config)
        return limit

    def find_plan(self, budget: Budget) -> Plan:
        """Search the best plan within a budget."""
        limit = self.limit(budget)
        module, config = self.search
        problem = self.problem(limit)
        want = self.recipe.measure
        if self.recipe.space is None or want is None:
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
        space, want = self.recipe.space, self.recipe.measure
        assert space is not None
        assert want is not None
        tokens = self.judges[0].tokens
        key = digest(
            [self.stats_key, self._step(self.recipe.quant), background.model_dump(mode="json"), list(tokens.shape)]
        )
        journal = self.cache / "measurements" / f"{key}.jsonl"
        with self.reporter.stage("damage of each choice" + (f", round {number + 1}" if number else "")) as progress:
            found = measure(
                self.judges[0], self.layout, self.candidates, space, background, journal,
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
        self._release()
        with Writer(out, self.layout, plan) as writer:
            trial = self._trial_folder(plan) if self._judges else None
            if trial is not None and trial.exists():
                writer.take(trial)
            else:
                self._apply(plan, writer, "pruning, refit, quantisation")
            self._beside(writer.plan, writer)
        return writer.plan

    def _apply(self, plan: Plan, writer: Writer, stage: str) -> None:
        """Fill `writer`, and say in its plan what the plan costs on held-out tokens."""
        needs = self.stats is not None
        with self.reporter.stage(stage) as progress:
            measured = apply_plan(
                self.stream, plan, self.tokens.tokens if needs else torch.zeros(1, 2, dtype=torch.long), self.method,
                self.repair[1], self.stats, writer, progress, self.held_out.tokens if self._judges else None,
            )  # fmt: skip
        found = plan.found_by.model_copy(update={"measured_damage": measured})
        writer.plan = plan.model_copy(update={"found_by": found})

    def _beside(self, plan: Plan, writer: Writer) -> None:
        """The files beside the weights: tokenizer, templates, licence, recipe, model card."""
        writer.write(RECIPE_FILE, self.recipe.to_yaml())
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


def compress(session: Session, budget: Budget, out: Path) -> Plan:
    """The main job: find the best plan within the budget, apply it, write the directory."""
    require_absent(out)
    return session.write(session.find_plan(budget), out)
