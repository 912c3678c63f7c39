"""What a recipe makes of a model before any budget is asked for: text, statistics, rankings, candidates.

Each is computed once, when it is first needed, and cached by its content.
"""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import trimbit
from trimbit.calibrate.sample import sample_self
from trimbit.calibrate.stats import Stats, collect, stored
from trimbit.calibrate.teacher import teacher_outputs
from trimbit.calibrate.text import TokenSet, from_file
from trimbit.errors import ArtifactError, DataError, RecipeError
from trimbit.jobs.cache import cache_root, save_atomically, source_digest
from trimbit.jobs.progress import Progress, Reporter, Silent
from trimbit.measure.layer_importance import layer_information
from trimbit.measure.ranking import by_gradients, by_moments, require_samples
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.checkpoint import Checkpoint
from trimbit.model.forward.compute import fastest_device
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.model.forward.stream import BlockStream
from trimbit.model.layout import Layout
from trimbit.recover.instructions import from_instructions, from_rows
from trimbit.recover.recovery import Recovery
from trimbit.recover.tune import Config as Tuning
from trimbit.recover.tune import Example
from trimbit.schema.base import digest
from trimbit.schema.objective import Objective
from trimbit.schema.plan import ModelRef
from trimbit.schema.recipe import Recipe, Step, step_config
from trimbit.schema.space import Space
from trimbit.search.ratio import kept_widths, protected
from trimbit.search.two_formats.config import MaskedSearch
from trimbit.transform.cut import cut_unit
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.rotate import RotatedStream, require_rotatable
from trimbit.transform.weight import Method
from trimbit.trial.applied import AppliedPlans
from trimbit.trial.candidates import CandidateWeights
from trimbit.trial.channels import Channels
from trimbit.trial.masked.layers import Layers
from trimbit.trial.masked.model import MaskedModel, of_length

STEPS = {  # fields of a recipe: what the method is called, the room of its module, and what the module must offer
    "criterion": ("criteria", "measure.criteria", "score"),
    "search": ("search", "search.methods", "search"),
    "quant": ("quant", "transform.quant", "quantize"),
    "importance": ("criteria", "measure.criteria", "information"),
    "repair": ("repair", "transform.repair", "refit"),
    "lowrank": ("repair", "transform.repair", "correct"),
    "tune": ("repair", "recover", "tune"),
}


def resolved_fields(recipe: Recipe) -> dict[str, Any]:
    """A recipe with every parameter of its steps, those that it leaves at their defaults included."""
    fields = recipe.model_dump(mode="json")
    for name, (kind, _, _) in STEPS.items():
        step = getattr(recipe, name)
        if step is not None:
            params = step_config(module_of(name, step).Config, kind, step).model_dump(mode="json")
            fields[name] = {"name": step.name, "params": params}
    return fields


def module_of(field: str, step: Step) -> ModuleType:
    """The module of a step by its name; `field` is the recipe's.

    Raises:
        RecipeError: if there is none.
    """
    kind, room, _ = STEPS[field]
    name = f"trimbit.{room}.{step.name}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as err:
        if err.name != name:
            raise
        raise RecipeError(f"no {kind} method {step.name!r}: there is no module {name}") from err


@dataclass(kw_only=True)
class Preparation:
    """One model, one recipe, one text, one seed."""

    checkpoint: Checkpoint
    recipe: Recipe
    calibration: str = "self"  # or a file
    seed: int = 0
    reporter: Reporter = field(default_factory=Silent)
    cache: Path = field(default_factory=cache_root)
    threads: int = field(default_factory=torch.get_num_threads)  # that text is sampled with: it decides the text

    def __post_init__(self) -> None:
        self._masked: tuple[MaskedSearch, MaskedModel] | None = None
        recipe = self.recipe
        self.quant = self._module("quant", recipe.quant)
        self.search = self._module("search", recipe.search)
        self.criterion = self._module("criterion", recipe.criterion) if recipe.criterion else None
        self.layers = self._module("importance", recipe.importance) if recipe.importance else None
        self.repair = self._module("repair", recipe.repair) if recipe.repair else None
        self.lowrank = self._module("lowrank", recipe.lowrank)[1] if recipe.lowrank else None
        self.tuning: Tuning | None = self._module("tune", recipe.tune)[1] if recipe.tune else None
        self.compute: torch.dtype = getattr(torch, recipe.compute)
        if self.tuning is not None and self.lowrank is None:
            raise RecipeError("`tune` trains low-rank pairs: the recipe needs a `lowrank` too")
        if self.tuning is not None and self.tuning.loss == "instruct" and self.tuning.data is None:
            raise RecipeError("tune.loss instruct needs tune.data, a .jsonl file with `instruction` and `output`")
        if self.objective is not None and self.objective.steps and self.tuning is None:
            raise RecipeError("search.objective.steps trains low-rank pairs: the recipe needs a `tune`")
        if recipe.rotation is not None and recipe.criterion is not None:
            raise RecipeError(
                "`rotation` mixes the channels that a `criterion` would rank and cut: leave out one of them"
            )
        if recipe.rotation is not None and recipe.tune is not None:
            raise RecipeError("`tune` does not train pairs beside rotated inputs: leave out it or `rotation`")
        for field_name in self.search[0].NEEDS:
            if getattr(recipe, field_name) is None:
                raise RecipeError(f"search {recipe.search.name} needs a `{field_name}` in the recipe")
        if isinstance(self.search[1], MaskedSearch):
            self._check_masking(self.search[1])
        self._check_text()
        if "space" in self.search[0].NEEDS and recipe.space is not None:
            for name in ("formats", "embedding_formats"):
                if not getattr(recipe.space, name):
                    raise RecipeError(f"space.{name} is empty: search {recipe.search.name} has nothing to choose from")
        if recipe.prune is not None and recipe.criterion is None:
            raise RecipeError("`prune` needs a `criterion` in the recipe, to say what goes first")
        if self.calibration != "self" and not Path(self.calibration).is_file():
            raise DataError(f"no calibration text {self.calibration!r}: give `self` or a file")

    def _check_text(self) -> None:
        """Refuse stages that ask for more text than there is, before any of it is read."""
        have, measured = self.recipe.calibration, self.recipe.measure
        if measured is not None and measured.rows > have.rows:
            raise RecipeError(f"measure.rows: {measured.rows} of {have.rows} calibration rows asked")
        if self.criterion is not None and self.criterion[0].READS == "gradients":
            require_samples(self.criterion[1], have.rows, have.length)

    def _check_masking(self, config: MaskedSearch) -> None:
        want = self.recipe.calibration
        if config.length > want.length:
            raise RecipeError(
                f"search.length is {config.length} tokens, but a row has {want.length}: raise calibration.length"
            )
        rows = (want.training or want.rows) * (want.length // config.length)
        if config.compared(rows) > rows:
            raise RecipeError(f"search.rows: {config.compared(rows)} of {rows} rows asked; raise calibration.training")

    def _module(self, name: str, step: Step) -> tuple[ModuleType, Any]:
        kind, _, offers = STEPS[name]
        module = module_of(name, step)
        if not hasattr(module, offers):
            raise RecipeError(f"{kind} {step.name} cannot stand here: it does not offer `{offers}`")
        return module, step_config(module.Config, kind, step)

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
    def original(self) -> BlockStream:
        """The dense model as it is, block by block."""
        return BlockStream(self.checkpoint, self.layout, self.compute)

    @cached_property
    def stream(self) -> BlockStream:
        """The dense model in the basis of the plans, block by block."""
        rotation = self.recipe.rotation
        if rotation is None:
            return self.original
        return RotatedStream(self.checkpoint, self.layout, rotation, self.compute)

    def require_rotatable(self) -> None:
        """Refuse a rotation that the model cannot have.

        Raises:
            LayoutError: if its norms stand in the way.
            PlanError: if a size has no Hadamard matrix.
        """
        if self.recipe.rotation is not None:
            require_rotatable(self.layout)

    @cached_property
    def tokens(self) -> TokenSet:
        """The calibration tokens."""
        return self._text[0]

    @cached_property
    def held_out(self) -> TokenSet:
        """Tokens of the same text that nothing is fitted to."""
        return self._text[1]

    @cached_property
    def training(self) -> TokenSet:
        """What masks and low-rank pairs are trained on, where the recipe names no other data."""
        return self._text[2]

    @cached_property
    def _text(self) -> tuple[TokenSet, TokenSet, TokenSet]:
        want = self.recipe.calibration
        rows, tokenizer = want.rows + want.held_out + want.training, self.checkpoint.tokenizer()
        if self.calibration == "self":
            found = self._sampled(tokenizer, rows, want.length)
        else:
            try:
                path = Path(self.calibration)
                found = from_file(path, tokenizer, rows=rows, length=want.length, seed=self.seed)
            except DataError as err:
                parts = "calibration.rows + calibration.held_out + calibration.training"
                raise DataError(f"{err} (rows are {parts})") from err
        fitted, held_out = found.split(want.held_out)
        if not want.training:
            return fitted, held_out, fitted
        fitted, training = fitted.split(want.training)
        return fitted, held_out, training

    def _sampled(self, tokenizer: Any, rows: int, length: int) -> TokenSet:  # noqa: ANN401
        """Text of the model's own, sampled once."""
        key = digest(
            [
                trimbit.__version__,
                self.model.weights_hash,
                self.recipe.compute,
                rows,
                length,
                self.seed,
                self.threads,
            ]
        )
        path = self.cache / "tokens" / f"{key}.safetensors"
        if path.exists():
            return TokenSet(name="self", tokens=load_file(path)["tokens"], seed=self.seed)
        with self.reporter.stage("text sampled from the model") as progress:
            model = InMemoryModel(self.original).model
            found = sample_self(model, tokenizer, rows=rows, length=length, seed=self.seed, progress=progress)
        save_atomically(path, lambda beside: save_file({"tokens": found.tokens}, beside))
        return found

    @cached_property
    def stats_key(self) -> str:
        """Content key of the statistics."""
        return digest(
            [
                source_digest("model", "calibrate"),
                self.model.weights_hash,
                self.model.config_hash,
                self.tokens.digest,
                self.recipe.compute,
                *self._basis,
            ]
        )

    @property
    def _basis(self) -> list[Any]:
        """The rotation and its code, for a content key."""
        rotation = self.recipe.rotation
        code = ("transform/rotate.py", "runtime/rotation.py", "kernels/hadamard.py")
        return [] if rotation is None else [rotation.model_dump(mode="json"), source_digest(*code)]

    @property
    def _needs_moments(self) -> bool:
        ranks = self.criterion is not None and self.criterion[0].READS == "moments"
        ranks = ranks or getattr(self.search[0], "READS", None) == "moments"
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

    @property
    def channels(self) -> Channels | None:
        """What is known of the input channels of weights, where there are statistics."""
        stats = self.stats
        return None if stats is None else Channels(checkpoint=self.stream.checkpoint, layout=self.layout, stats=stats)

    @cached_property
    def rankings(self) -> dict[str, tuple[int, ...]]:
        """For each dim, its indices, the one to keep longest first."""
        if self.criterion is None:
            return {}
        module, config = self.criterion

        def make(progress: Progress) -> dict[str, tuple[int, ...]]:
            if module.READS == "moments":
                assert self.stats is not None
                return by_moments(module, config, self.layout, self.checkpoint, self.stats, progress)
            return by_gradients(module, config, self.stream, self.tokens.tokens, progress)

        code = source_digest("measure", "calibrate")
        decides = [code, self.stats_key, self.plain(self.recipe.criterion)]
        found = self._stored("rankings", decides, "ranking of channels and heads", make)
        return {dim: tuple(order) for dim, order in found.items()}

    @cached_property
    def importance(self) -> dict[str, float]:
        """The importance of each block and sub-block of the pruned model to the task."""
        assert self.layers is not None
        code = source_digest("measure", "model")
        decides = [code, self.stats_key, self.plain(self.recipe.importance), self.kept(self.space.kept)]
        load, tokens, config = self._pruned, self.tokens.tokens, self.layers[1]
        return self._stored(
            "importance", decides, "importance of each layer",
            lambda progress: layer_information(self.stream, load, tokens, config, progress),
        )  # fmt: skip

    def _stored(
        self, kind: str, decides: list[Any], stage: str, make: Callable[[Progress], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `make` gives, kept as JSON by what decides it."""
        path = self.cache / kind / f"{digest(decides)}.json"
        if not path.exists():
            with self.reporter.stage(stage) as progress:
                text = json.dumps(make(progress))
            save_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as err:
            raise ArtifactError(f"{path}: a file of the cache is damaged; remove it and run again") from err

    def kept(self, widths: Mapping[str, int]) -> dict[str, list[int]]:
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

    def plain(self, step: Step | None) -> dict[str, Any] | None:
        """A step as plain data, for a content key."""
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
        space = self.recipe.space or Space(formats=(), embedding_formats=())
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
        steps = [self.plain(step) for step in (recipe.quant, recipe.repair, recipe.lowrank)]
        code = source_digest("transform", "kernels", "trial/candidates.py", "calibrate")
        key = digest([code, source, *steps, self.seed if self.rank else 0, *self._basis])
        return CandidateWeights(
            self.stream.checkpoint,
            self.layout,
            self.stats,
            self.method,
            self.cache / "candidates" / key,
            self.rankings,
            self.space,
            rank=self.rank,
            refits=self.repair is not None,
        )

    @property
    def sweep(self) -> gptq.Config:
        """The GPTQ whose errors a search expects: the recipe's, or one as it comes."""
        module, config = self.quant
        return config if module is gptq else gptq.Config()

    def masked(self, config: MaskedSearch) -> MaskedModel:
        """The model with a search's two formats in every weight."""
        if self._masked is None or self._masked[0] != config:
            self._masked = config, self._make_masked(config)
        return self._masked[1]

    def _make_masked(self, config: MaskedSearch) -> MaskedModel:
        assert self.channels is not None
        method = (
            self.method if config.error_model == "quantizer" else Method(module=rtn, config=rtn.Config(scales="mse"))
        )
        orders = {
            site: torch.tensor(own).argsort(stable=True) if config.sort else torch.arange(len(own))
            for site, own in self.channels.second_moments().items()
        }
        code = source_digest("transform", "kernels", "trial/candidates.py", "calibrate")
        quant = self.plain(self.recipe.quant) if config.error_model == "quantizer" else None
        key = digest([code, self.stats_key, config.sort, quant])
        candidates = CandidateWeights(
            self.stream.checkpoint, self.layout, self.stats, method, self.cache / "candidates" / key, {}, None,
            orders=orders,
        )  # fmt: skip
        rows, held_out = of_length(self.training.tokens, config.length), self.held_out.tokens
        with self.reporter.stage("the original's answers") as progress:
            distilled = [*held_out, *rows[: config.compared(len(rows))]]
            original = teacher_outputs(self.original, distilled, self.teacher_cache, progress)
        with self.reporter.stage("both formats of the weights") as progress:
            layers = Layers(candidates, config, orders, self.sweep)
            return MaskedModel(self.stream, layers, rows, held_out, original, config, progress)

    @property
    def teacher_cache(self) -> Path:
        """Where the original's answers are kept."""
        code = source_digest("model", "calibrate/teacher.py")
        device = fastest_device().type
        answers = digest([code, self.model.weights_hash, self.model.config_hash, self.recipe.compute, device])
        return self.cache / "originals" / answers

    @cached_property
    def trials(self) -> AppliedPlans:
        """Plans applied for real."""
        steps = (self.recipe.quant, self.recipe.repair, self.recipe.lowrank)
        judged = self.held_out if self.measures_plans else None
        decides = (
            self.stats_key if judged else self.model.weights_hash, judged.digest if judged else None,
            *(self.plain(step) for step in steps), self.seed if self.rank else 0,
        )  # fmt: skip
        return AppliedPlans(
            stream=self.stream, method=self.method, repair=self.repair[1] if self.repair else None, stats=self.stats,
            tokens=self.tokens.tokens if self.stats is not None else None, held_out=judged.tokens if judged else None,
            folder=self.cache / "trials", decides=decides, reporter=self.reporter,
        )  # fmt: skip

    @cached_property
    def recovery(self) -> Recovery:
        """Training of what plans leave of this model."""
        assert self.tuning is not None
        return Recovery(
            stream=self.original, config=self.tuning, examples=self.examples, held_out=self.held_out.tokens,
            seed=self.seed, teacher_cache=self.teacher_cache, states=self.cache / "tuned",
            reporter=self.reporter,
        )  # fmt: skip

    @cached_property
    def examples(self) -> list[Example]:
        """What recovery trains on."""
        assert self.tuning is not None
        if self.tuning.data is None:
            return from_rows(self.training.tokens, self.checkpoint.tokenizer(), self.tuning.length)
        tokenizer, masked = self.checkpoint.tokenizer(), self.tuning.loss == "instruct"
        return from_instructions(Path(self.tuning.data), tokenizer, self.tuning.length, masked=masked)

    @property
    def objective(self) -> Objective | None:
        """What a search by trials goes by."""
        return getattr(self.search[1], "objective", None)

    @property
    def measures_plans(self) -> bool:
        """Whether there is text to say what a plan costs: a recipe that neither fits nor measures needs none."""
        return self._needs_moments or self.recipe.measure is not None or self.tuning is not None
