"""The calibration text of a job, by what its rows are for."""

from dataclasses import dataclass
from pathlib import Path

from trimbit.calibrate.sample import sample_self
from trimbit.calibrate.text import TokenSet, from_file, tokenizer_digest
from trimbit.errors import DataError
from trimbit.jobs.checked import load_tensors, save_tensors
from trimbit.jobs.stages import Stage, Work
from trimbit.model.forward.in_memory import InMemoryModel
from trimbit.pipeline.job import Job
from trimbit.pipeline.keys import TextKey


@dataclass(frozen=True, kw_only=True)
class Text:
    """Rows of tokens: no row has two uses, but that masks and pairs train on the fitted rows where none are extra."""

    fit: TokenSet  # statistics, refits and quantisers are fitted to these
    choose: TokenSet  # whole plans are compared on these
    train: TokenSet  # masks and pairs are trained on these

    @property
    def digests(self) -> list[str]:
        """Of all parts, for a content key."""
        return [self.fit.digest, self.choose.digest, self.train.digest]


def rows_of(job: Job) -> int:
    """Rows of the whole text."""
    want = job.recipe.calibration
    return want.rows + want.held_out + want.training


def text_of(job: Job) -> Text:
    """Read or sample the text of a job, once.

    Raises:
        DataError: if the file cannot be read or is too short, naming the fields that ask for rows.
    """
    want, rows = job.recipe.calibration, rows_of(job)
    if job.calibration == "self":
        found = _sampled(job, rows, want.length)
    else:
        try:
            path = Path(job.calibration)
            found = from_file(path, job.checkpoint.tokenizer(), rows=rows, length=want.length, seed=job.seed)
        except DataError as err:
            parts = "calibration.rows + calibration.held_out + calibration.training"
            raise DataError(f"{err} (rows are {parts})") from err
    fit, choose = found.split(want.held_out)
    if not want.training:
        return Text(fit=fit, choose=choose, train=fit)
    fit, train = fit.split(want.training)
    return Text(fit=fit, choose=choose, train=train)


def _sampled(job: Job, rows: int, length: int) -> TokenSet:
    """Text that the model itself has written."""
    tokenizer = job.checkpoint.tokenizer()

    def make(work: Work) -> None:
        model = InMemoryModel(job.original).model
        found = sample_self(model, tokenizer, rows=rows, length=length, seed=job.seed, progress=work.progress)
        save_tensors(work.folder / "tokens.safetensors", {"tokens": found.tokens})

    def load(folder: Path) -> TokenSet:
        found = load_tensors(folder / "tokens.safetensors")
        assert found is not None, f"{folder} was checked when it was opened"
        return TokenSet(name="self", tokens=found[0]["tokens"], seed=job.seed)

    key = TextKey(
        weights=job.model.weights_hash, config=job.model.config_hash, tokenizer=tokenizer_digest(tokenizer),
        compute=job.recipe.compute, rows=rows, length=length, seed=job.seed, threads=job.threads,
    )  # fmt: skip
    return job.runner.run(Stage(key=key, title="text sampled from the model", make=make, load=load))
