"""The candidates of a job, and their key."""

from trimbit.pipeline.job import Job, plain
from trimbit.pipeline.keys import CandidatesKey
from trimbit.pipeline.prepare import Prepared, moments_key
from trimbit.trial.candidates import CandidateWeights


def candidates_key(job: Job, prepared: Prepared, **changed: object) -> CandidatesKey:
    """The key of candidates; `changed` replaces fields for another quantiser or order of columns."""
    recipe, rotation = job.recipe, job.recipe.rotation
    fitted = prepared.text is not None and prepared.stats is not None
    fields = {
        "source": moments_key(job, prepared.text).digest if prepared.text and fitted else job.model.weights_hash,
        "quant": plain(recipe.quant),
        "repair": plain(recipe.repair),
        "lowrank": plain(recipe.lowrank),
        "seed": job.seed if job.rank else None,
        "rotation": rotation.model_dump(mode="json") if rotation else None,
    }
    return CandidatesKey.model_validate(fields | changed)


def candidates_of(job: Job, prepared: Prepared) -> CandidateWeights:
    """The weights of every choice of the job's space."""
    key = candidates_key(job, prepared)
    return CandidateWeights(
        job.stream.checkpoint, job.layout, prepared.stats, job.compressor,
        job.runner.cache.store(key.stage, key.digest), prepared.rankings, job.space,
        rank=job.rank, refits=job.steps.repair is not None, device=job.device, ahead=not job.predicts,
    )  # fmt: skip
