"""Whole plans applied for real: each is kept under its content key, to be judged, trained, or written if chosen."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from trimbit.artifact.files import PLAN_FILE
from trimbit.artifact.writer import Writer
from trimbit.calibrate.stats import Stats
from trimbit.errors import ArtifactError
from trimbit.jobs.cache import source_digest
from trimbit.jobs.progress import Reporter
from trimbit.model.forward.stream import BlockStream
from trimbit.schema.base import digest
from trimbit.schema.plan import Plan, load_plan
from trimbit.transform.apply import apply_plan
from trimbit.transform.repair import refit
from trimbit.transform.weight import Method


@dataclass(frozen=True, kw_only=True)
class AppliedPlans:
    """Applied plans of one model, one text and one method."""

    stream: BlockStream
    method: Method
    repair: refit.Config | None
    stats: Stats | None
    tokens: Int[Tensor, "rows length"] | None  # what the method is fitted to, if it fits anything
    held_out: Int[Tensor, "held held_length"] | None  # what a plan is judged on, if it is judged
    folder: Path
    decides: tuple[Any, ...]  # all of that as plain data, for the content key
    reporter: Reporter

    def place(self, plan: Plan) -> Path:
        """Where an applied plan is kept; the cache of keys and values changes nothing of what is written."""
        what = plan.model_dump(mode="json", exclude={"found_by", "kv_cache"})
        return self.folder / digest([source_digest(), *self.decides, what])

    def applied(self, plan: Plan) -> Path:
        """The directory of a plan, which is applied if it was not before."""
        folder = self.place(plan)
        if not folder.exists():
            try:
                with Writer(folder, self.stream.layout, plan) as writer:
                    self.write(plan, writer, f"trial of {plan.found_by.method}")
            except ArtifactError:
                if not folder.exists():  # else another run has tried the same plan meanwhile
                    raise
        return folder

    def forget(self, plan: Plan) -> None:
        """Remove what is kept of a plan."""
        shutil.rmtree(self.place(plan), ignore_errors=True)

    def damage(self, plan: Plan) -> float:
        """KL of an applied plan on the held-out tokens."""
        measured = load_plan(self.applied(plan) / PLAN_FILE).found_by.measured_damage
        assert measured is not None
        return measured

    def write(self, plan: Plan, writer: Writer, stage: str) -> None:
        """Fill `writer`, and say in its plan what the plan costs on the held-out tokens."""
        none = torch.zeros(1, 2, dtype=torch.long)
        with self.reporter.stage(stage) as progress:
            measured = apply_plan(
                self.stream, plan, none if self.tokens is None else self.tokens, self.method, self.repair, self.stats,
                writer, progress, self.held_out,
            )  # fmt: skip
        writer.plan = plan.with_provenance(measured_damage=measured)
