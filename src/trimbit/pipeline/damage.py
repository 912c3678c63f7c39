"""The damage of every choice: the keys of measurements, and the stage that predicts it."""

import json
from pathlib import Path

from trimbit.errors import RecipeError
from trimbit.jobs.checked import load_json, save_json
from trimbit.jobs.stages import Stage, Work
from trimbit.measure.predict import predict
from trimbit.measure.removals import measure_removals, removable
from trimbit.pipeline.candidates import candidates_key
from trimbit.pipeline.job import Job
from trimbit.pipeline.keys import DamageKey, PredictedKey, RemovalsKey
from trimbit.pipeline.prepare import Prepared, kept_members, moments_key
from trimbit.pipeline.text import Text
from trimbit.schema.base import digest
from trimbit.schema.measurements import Background, Measurements
from trimbit.transform.quant import gptq, rtn
from trimbit.trial.candidates import CandidateWeights
from trimbit.trial.expected import ExpectedErrors


def require_predictable(job: Job) -> None:
    """Refuse a recipe whose damage cannot be predicted.

    Raises:
        RecipeError: if it has several rounds, low-rank pairs, or a quantiser whose errors cannot be predicted.
    """
    want = job.recipe.measure
    if not job.predicts:
        return
    assert want is not None
    if want.rounds > 1:
        raise RecipeError("measure.by=predicted does not depend on a background; set measure.rounds=1")
    if job.rank:
        raise RecipeError("measure.by=predicted does not know what low-rank pairs make up for; set measure.by=measured")
    if not isinstance(job.steps.quant.config, gptq.Config | rtn.Config):
        raise RecipeError(f"measure.by=predicted expects errors of gptq or rtn, not of {job.recipe.quant.name}")


def damage_key(job: Job, prepared: Prepared, background: Background) -> DamageKey:
    """The key of the damage of choices in a background."""
    text = prepared.text
    assert text is not None
    assert text.damage is not None
    return DamageKey(
        moments=moments_key(job, text).digest, candidates=candidates_key(job, prepared).digest,
        background=background.model_dump(mode="json"), kept=kept_members(prepared, background.widths),
        tokens=text.damage.digest,
    )  # fmt: skip


def removals_stage(job: Job, text: Text) -> Stage[dict[str, float]] | None:
    """The stage that measures the model without each sub-block; None: all of them stay."""
    dims = [unit.dim for unit in removable(job.layout, job.space) if unit.dim is not None]
    if not dims:
        return None
    assert text.damage is not None
    tokens = text.damage
    key = RemovalsKey(
        weights=job.model.weights_hash, config=job.model.config_hash, tokens=tokens.digest, compute=job.recipe.compute,
        dims=dims,
    )  # fmt: skip

    def make(work: Work) -> None:
        found = measure_removals(job.stream, tokens.tokens, job.space, work.folder, work.progress)
        save_json(work.folder / "removals.json", found)

    def load(folder: Path) -> dict[str, float]:
        found: dict[str, float] = load_json(folder / "removals.json")
        return found

    return Stage(key=key, title="damage of leaving out each sub-block", make=make, load=load)


def predicted_key(job: Job, prepared: Prepared) -> PredictedKey:
    """The key of the predicted damage."""
    text, want = prepared.text, job.recipe.measure
    assert text is not None
    assert text.damage is not None
    assert want is not None
    return PredictedKey(
        moments=moments_key(job, text).digest, candidates=candidates_key(job, prepared).digest,
        space=job.space.model_dump(mode="json"),
        rankings=digest({dim: list(own) for dim, own in prepared.rankings.items()}),
        tokens=text.damage.digest, draws=want.draws, seed=job.seed,
    )  # fmt: skip


def predicted_stage(job: Job, prepared: Prepared, candidates: CandidateWeights) -> Stage[Measurements]:
    """The stage that predicts damage; `candidates` gives the refitted cuts."""
    text, want = prepared.text, job.recipe.measure
    assert text is not None
    assert text.damage is not None
    assert want is not None
    tokens, config = text.damage, job.steps.quant.config
    assert isinstance(config, gptq.Config | rtn.Config)

    def make(work: Work) -> None:
        errors = ExpectedErrors(job.stream.checkpoint, job.layout, prepared.stats, config)
        found = predict(
            job.stream, tokens.tokens, want.draws, job.seed, job.space, errors, candidates.change, prepared.rankings,
            job.model, tokens.digest, work.progress,
        )  # fmt: skip
        save_json(work.folder / "measurements.json", found.model_dump(mode="json"))

    def load(folder: Path) -> Measurements:
        return Measurements.model_validate_json(json.dumps(load_json(folder / "measurements.json")))

    return Stage(key=predicted_key(job, prepared), title="damage of each choice, predicted", make=make, load=load)
