"""The inputs of a job: one model, recipe, text and seed, for any number of budgets; no results."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trimbit.calibrate.builtin import NAME as BUILTIN
from trimbit.calibrate.builtin import builtin_text
from trimbit.calibrate.text import TokenSet, from_file
from trimbit.jobs.progress import Reporter
from trimbit.jobs.stages import Runner
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.checkpoint import Checkpoint
from trimbit.model.forward.compute import fastest_device, named_device, native
from trimbit.model.forward.stream import BlockStream
from trimbit.model.layout import Layout
from trimbit.pipeline.steps import Steps, open_steps
from trimbit.schema.objective import Objective
from trimbit.schema.plan import ModelRef
from trimbit.schema.recipe import Recipe, Step
from trimbit.schema.space import Space
from trimbit.search.ratio import kept_widths, protected
from trimbit.search.two_formats.config import MaskedSearch
from trimbit.transform.rotate import RotatedStream
from trimbit.transform.weight import WeightCompressor
from trimbit.trial.masked.memory import masked_nbytes

BLOCKS = 4  # in fp32: the most that a stage holds of a block, its copies and the moments of its inputs


@dataclass(frozen=True, kw_only=True)
class Job:
    """The inputs of a job."""

    checkpoint: Checkpoint
    recipe: Recipe
    calibration: str = "self"  # or `builtin`, or a file
    seed: int = 0
    device_name: str = "auto"  # or `cpu`, `cuda`, `cuda:1`
    threads: int = field(default_factory=torch.get_num_threads)  # for sampling text, which depends on them
    runner: Runner = field(default_factory=Runner)

    @cached_property
    def steps(self) -> Steps:
        """The recipe's methods and their configurations."""
        return open_steps(self.recipe)

    @property
    def compute(self) -> torch.dtype:
        """The dtype of matrix products."""
        dtype: torch.dtype = getattr(torch, self.recipe.compute)
        return dtype

    @cached_property
    def device(self) -> torch.device:
        """The device that blocks are run on, one at a time; a search for masks needs the whole model there."""
        config = self.steps.search
        block = 4 * self.layout.parameters // self.layout.blocks
        masked = isinstance(config, MaskedSearch)
        return named_device(
            self.device_name, masked_nbytes(self.layout, config, self.compute.itemsize) if masked else BLOCKS * block
        )

    @cached_property
    def whole_device(self) -> torch.device:
        """The device that holds the whole model where a stage needs it: `device` if there is room, else the CPU."""
        nbytes = 2 * self.compute.itemsize * self.layout.parameters
        return fastest_device(nbytes, self.device) if self.device.type == "cuda" else self.device

    @property
    def reporter(self) -> Reporter:
        """The reporter of progress."""
        return self.runner.reporter

    @cached_property
    def layout(self) -> Layout:
        """The structure of the model."""
        return build_layout(self.checkpoint.config)

    @cached_property
    def model(self) -> ModelRef:
        """The reference that ties plans and measurements to the model."""
        c = self.checkpoint
        return ModelRef(id=c.model_id, config_hash=c.config_hash(), weights_hash=c.weights_hash())

    @cached_property
    def original(self) -> BlockStream:
        """The dense model without rotation, block by block."""
        return BlockStream(self.checkpoint, self.layout, self.compute, self.device)

    @cached_property
    def sampled(self) -> BlockStream:
        """The dense model in the type that the device multiplies fastest, to sample text from."""
        fast = native(self.compute, self.device.type)
        return self.original if fast is self.compute else BlockStream(self.checkpoint, self.layout, fast, self.device)

    @cached_property
    def stream(self) -> BlockStream:
        """The dense model in the basis of the plans, block by block."""
        rotation = self.recipe.rotation
        if rotation is None:
            return self.original
        return RotatedStream(self.checkpoint, self.layout, rotation, self.compute, self.device)

    @cached_property
    def space(self) -> Space:
        """The search space, with the widths that are fixed before the search."""
        space = self.recipe.space or Space(formats=(), embedding_formats=())
        if self.recipe.prune is None:
            return space
        fixed = {
            "kept": kept_widths(self.layout, self.recipe.prune),
            "spared": protected(self.layout, self.recipe.prune),
        }
        return space.model_copy(update=fixed)

    @property
    def compressor(self) -> WeightCompressor:
        """How a weight is compressed."""
        quant = self.steps.quant
        return WeightCompressor(module=quant.module, config=quant.config, pairs=self.steps.lowrank, seed=self.seed)

    @property
    def rank(self) -> int:
        """The rank of the low-rank pair of each weight in the blocks; 0: no pairs."""
        return self.steps.lowrank.rank if self.steps.lowrank is not None else 0

    @property
    def predicts(self) -> bool:
        """Whether the search reads the damage of choices, and it is predicted."""
        measure = self.recipe.measure
        return measure is not None and measure.by == "predicted" and self.steps.method.measures_damage

    @property
    def damage_rows(self) -> int:
        """The number of rows whose beginnings the damage of choices is found on: different texts, not pieces of one."""
        measure = self.recipe.measure
        return measure.rows if measure is not None and self.steps.method.measures_damage else 0

    @property
    def rows(self) -> int:
        """The number of rows of the whole text."""
        want = self.recipe.calibration
        return want.rows + want.training + want.held_out + self.damage_rows + want.report

    @cached_property
    def read(self) -> TokenSet:
        """The rows of a text that is not sampled.

        Raises:
            DataError: if it cannot be read or is too short.
        """
        tokenizer, length = self.checkpoint.tokenizer(), self.recipe.calibration.length
        if self.calibration == BUILTIN:
            return builtin_text(tokenizer, rows=self.rows, length=length, seed=self.seed)
        return from_file(Path(self.calibration), tokenizer, rows=self.rows, length=length, seed=self.seed)

    @property
    def objective(self) -> Objective | None:
        """The objective of a search over whole plans; None for other searches."""
        method = self.steps.method
        return method.objective(self.steps.search) if method.objective else None

    @property
    def needs_moments(self) -> bool:
        """Whether any step reads the moments of the dense model."""
        criterion, repair = self.steps.criterion, self.steps.repair
        ranks = criterion is not None and criterion.module.READS == "moments"
        refits = criterion is not None and repair is not None
        return self.compressor.needs_moments or ranks or refits or self.steps.method.reads_moments

    @property
    def needs_text(self) -> bool:
        """Whether any step reads text: a recipe that neither fits nor measures needs none."""
        return self.needs_moments or self.recipe.measure is not None or self.recipe.tune is not None


def plain(step: Step | None) -> dict[str, Any] | None:
    """A step as plain data, for a content key."""
    return step.model_dump(mode="json") if step else None
