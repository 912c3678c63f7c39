"""The calibration text of a job, divided by use."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimbit.calibrate.builtin import NAME as BUILTIN
from trimbit.calibrate.sample import NAME as SELF
from trimbit.calibrate.sample import sample_self
from trimbit.calibrate.text import TokenSet, tokenizer_digest
from trimbit.jobs.checked import load_tensors, save_tensors
from trimbit.jobs.stages import Stage, Work
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.pipeline.job import Job
from trimbit.pipeline.keys import TextKey

NAMED = (SELF, BUILTIN)  # texts that are no files


@dataclass(frozen=True, kw_only=True)
class Text:
    """Rows of tokens by use. Each row has one use, but without training rows masks and pairs train on the fit rows."""

    fit: TokenSet  # statistics, refits and quantisers are fitted to these
    train: TokenSet  # masks and pairs are trained on these
    choose: TokenSet  # whole plans are compared on these
    damage: TokenSet | None  # damage of single choices is measured on these
    report: TokenSet  # the reported KL is measured on these: nothing is fitted to or chosen by them

    @property
    def digests(self) -> list[str]:
        """The digests of all parts, for a content key."""
        return [part.digest for part in (self.fit, self.train, self.choose, self.damage, self.report) if part]


def text_of(job: Job) -> Text:
    """Read or sample the text of a job, once.

    Raises:
        DataError: if the file cannot be read or is too short, naming the fields that ask for rows.
    """
    want, tokenizer = job.recipe.calibration, job.checkpoint.tokenizer()
    found = job.runner.run(sampled_stage(job, tokenizer)) if job.calibration == SELF else job.read
    counts = (want.rows, want.training, want.held_out, job.damage_rows, want.report)
    fit, train, choose, damage, report = found.split(*counts)
    measure, beginnings = job.recipe.measure, None
    if measure is not None and len(damage.tokens):
        beginnings = replace(damage, tokens=damage.tokens[:, : measure.length])
    return Text(fit=fit, train=train if want.training else fit, choose=choose, damage=beginnings, report=report)


def sampled_stage(job: Job, tokenizer: Any) -> Stage[TokenSet]:  # noqa: ANN401
    """The stage that samples text from the model."""
    rows, length = job.rows, job.recipe.calibration.length

    def make(work: Work) -> None:
        model = InMemoryModel(job.sampled, job.whole_device).model
        found = sample_self(
            model, tokenizer, rows=rows, length=length, seed=job.seed, progress=work.progress, folder=work.folder
        )
        save_tensors(work.folder / "tokens.safetensors", {"tokens": found.tokens})

    def load(folder: Path) -> TokenSet:
        found = load_tensors(folder / "tokens.safetensors")
        assert found is not None, f"{folder} was checked when it was opened"
        return TokenSet(name=SELF, tokens=found[0]["tokens"], seed=job.seed)

    key = TextKey(
        weights=job.model.weights_hash, config=job.model.config_hash, tokenizer=tokenizer_digest(tokenizer),
        compute=job.recipe.compute, rows=rows, length=length, seed=job.seed, threads=job.threads,
    )  # fmt: skip
    return Stage(key=key, title="text sampled from the model", make=make, load=load)
