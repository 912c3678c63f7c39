"""The stage that trains the low-rank pairs of an applied plan."""

import json
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from trimbit.calibrate.teacher import Teacher
from trimbit.jobs.checked import load_json, load_tensors, save_json, save_tensors
from trimbit.jobs.stages import Stage, Work
from trimbit.model.forward.logits import Divergence
from trimbit.pipeline.applying import Applied, applied_stage
from trimbit.pipeline.job import Job
from trimbit.pipeline.keys import PairsKey
from trimbit.pipeline.prepare import Prepared
from trimbit.pipeline.teacher import teacher
from trimbit.pipeline.text import Text
from trimbit.recover.instructions import from_instructions, from_rows
from trimbit.recover.recovery import divergence, train_pairs, with_pairs
from trimbit.recover.tune import Config, Example, Tuned, drawn, result_fields
from trimbit.schema.base import digest
from trimbit.schema.plan import Plan
from trimbit.transform.repair.lowrank import LowRank


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Trained pairs, and the losses and memory of their training."""

    pairs: dict[str, LowRank]
    losses: list[float]
    trained_nbytes: int
    optimizer_nbytes: int

    def record(self) -> str:
        """The content of tuning.json."""
        fields = {
            "losses": self.losses,
            "trained_nbytes": self.trained_nbytes,
            "optimizer_nbytes": self.optimizer_nbytes,
        }
        return json.dumps(fields, indent=1)


def examples_of(job: Job, text: Text | None) -> list[Example]:
    """The examples that recovery trains on."""
    config = job.steps.tune
    assert config is not None
    if config.data is None:
        assert text is not None
        return from_rows(text.train.tokens, job.checkpoint.tokenizer(), config.length)
    masked = config.loss == "instruct"
    return from_instructions(Path(config.data), job.checkpoint.tokenizer(), config.length, masked=masked)


def rows_digest(examples: list[Example]) -> str:
    """The content digest of the examples."""
    return digest([[row.tokens.tolist(), row.loss_mask.tolist()] for row in examples])


def config_of(job: Job, steps: int | None = None) -> Config:
    """The configuration of training; `steps` replaces the recipe's."""
    config = job.steps.tune
    assert config is not None
    return config if steps is None else config.model_copy(update={"steps": steps})


def teacher_of(job: Job, examples: list[Example], config: Config) -> Teacher | None:
    """The original's outputs for the rows that training draws; None if the loss needs only labels."""
    if config.loss != "distill":
        return None
    return teacher(job, (examples[at].tokens for at in drawn(config, len(examples), job.seed)))


def pairs_stage(job: Job, prepared: Prepared, plan: Plan, own: Applied, config: Config) -> Stage[Recovered]:
    """The stage that trains the pairs of an applied plan."""
    examples = examples_of(job, prepared.text)
    applied_key = applied_stage(job, prepared, plan, "").key.digest
    key = PairsKey(applied=applied_key, tune=result_fields(config), rows=rows_digest(examples), seed=job.seed)

    def make(work: Work) -> None:
        taught, state = teacher_of(job, examples, config), work.folder / "state.safetensors"
        tuned: Tuned = train_pairs(
            own.folder, config, examples, taught, state, job.seed, work.progress, job.whole_device
        )  # fmt: skip
        tensors = {f"{name}.{part}": getattr(pair, part) for name, pair in tuned.pairs.items() for part in "ab"}
        save_tensors(work.folder / "pairs.safetensors", tensors)
        save_json(work.folder / "training.json", [tuned.losses, tuned.trained_nbytes, tuned.optimizer_nbytes])
        state.unlink(missing_ok=True)

    def load(folder: Path) -> Recovered:
        found = load_tensors(folder / "pairs.safetensors")
        assert found is not None, f"{folder} was checked when it was opened"
        names = {name.rpartition(".")[0] for name in found[0]}
        losses, trained, optimizer = load_json(folder / "training.json")
        pairs = {name: LowRank(a=found[0][f"{name}.a"], b=found[0][f"{name}.b"]) for name in sorted(names)}
        return Recovered(pairs=pairs, losses=losses, trained_nbytes=trained, optimizer_nbytes=optimizer)

    return Stage(key=key, title="recovery", make=make, load=load)


def with_recovered(
    job: Job, rows: Int[Tensor, "rows length"], own: Applied, recovered: Recovered
) -> tuple[PreTrainedModel, Divergence]:
    """The recovered model, and its divergence from the original on some rows."""
    taught = teacher(job, rows)
    model = with_pairs(own.folder, recovered.pairs, job.whole_device)
    with job.reporter.stage("KL of the recovered model") as progress:
        return model, divergence(model, taught, rows, progress)
