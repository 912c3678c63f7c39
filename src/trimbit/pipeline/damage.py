"""The damage of every choice: the keys of measurements, and the stages that predict it and correct the prediction."""

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from trimbit.errors import RecipeError
from trimbit.jobs.checked import load_json, save_json
from trimbit.jobs.stages import Stage, Work
from trimbit.measure.corrected import Measured, corrected, to_measure
from trimbit.measure.predict import predict
from trimbit.measure.variants import Variant, measure_variants
from trimbit.model.forward.halves import only_half
from trimbit.model.forward.replaced import weights_replaced
from trimbit.model.forward.stream import CPU
from trimbit.model.layout import Layout
from trimbit.pipeline.candidates import candidates_key
from trimbit.pipeline.job import Job
from trimbit.pipeline.keys import CorrectedKey, DamageKey, PredictedKey
from trimbit.pipeline.prepare import Prepared, kept_members, moments_key
from trimbit.schema.base import digest
from trimbit.schema.measurements import Background, Measurements, WidthDamage
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


def predicted_stage(job: Job, prepared: Prepared, candidates: Callable[[], CandidateWeights]) -> Stage[Measurements]:
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
            job.stream, tokens.tokens, want.draws, job.seed, job.space, errors, candidates().change, prepared.rankings,
            job.model, tokens.digest, work.progress,
        )  # fmt: skip
        save_json(work.folder / "measurements.json", found.model_dump(mode="json"))

    return Stage(key=predicted_key(job, prepared), title="damage of each choice, predicted", make=make, load=_load)


def corrected_stage(
    job: Job, prepared: Prepared, found: Measurements, candidates: Callable[[], CandidateWeights]
) -> Stage[Measurements] | None:  # fmt: skip
    """The stage that measures some choices, and corrects predicted damage by them; None: there are none."""
    text, layout = prepared.text, job.layout
    assert text is not None
    assert text.damage is not None
    tokens, chosen = text.damage.tokens, to_measure(found, layout)
    if not chosen:
        return None
    config = job.steps.quant.config
    assert isinstance(config, gptq.Config | rtn.Config), "a search that measures quantises with one of them"

    def make(work: Work) -> None:
        variants: defaultdict[int, dict[str, Variant]] = defaultdict(dict)
        errors = ExpectedErrors(job.stream.checkpoint, layout, prepared.stats, config)
        for one in chosen:
            assert one.unit.block is not None
            variants[one.unit.block][one.name] = variant(layout, candidates, errors, one, job.device)
        measured = measure_variants(job.stream, tokens, variants, work.folder, work.progress)
        save_json(work.folder / "measurements.json", corrected(found, layout, measured).model_dump(mode="json"))

    key = CorrectedKey(predicted=predicted_key(job, prepared).digest)
    return Stage(key=key, title=f"damage of {len(chosen)} choices, measured", make=make, load=_load)


def variant(
    layout: Layout, candidates: Callable[[], CandidateWeights], errors: ExpectedErrors, one: Measured,
    device: torch.device = CPU,
) -> Variant:  # fmt: skip
    """How a block changes if a choice is made; no weight is quantised."""
    unit, choice = one.unit, one.choice
    if isinstance(choice, WidthDamage) and choice.width == 0:
        (other,) = (own for own in layout.units.values() if own.block == unit.block and own is not unit)
        return partial(only_half, layout=layout, unit=other)
    if isinstance(choice, WidthDamage):
        state = partial(candidates().cut_state, unit, choice.width)
    else:
        state = partial(errors.site_state, choice.site, choice.precision, device)
    return partial(weights_replaced, state=state, prefix=f"{layout.family.blocks}.{unit.block}.")


def _load(folder: Path) -> Measurements:
    return Measurements.model_validate_json(json.dumps(load_json(folder / "measurements.json")))
