"""Writing the compressed directory of a job with all its files."""

import shutil
from pathlib import Path

from trimbit.artifact.card import model_card
from trimbit.artifact.files import RECIPE_FILE
from trimbit.artifact.writer import Writer, copy_weights, write_file
from trimbit.model.resolved import resolve
from trimbit.pipeline.job import Job
from trimbit.pipeline.record import run_record
from trimbit.pipeline.result import Result
from trimbit.recover.recovery import adapter_tensors
from trimbit.report import training
from trimbit.report.pareto import best, picture, table, trials_of
from trimbit.schema.base import digest
from trimbit.schema.plan import Plan
from trimbit.schema.run import RUN_FILE

TUNING_FILE = "tuning.json"


def write(job: Job, result: Result, folder: Path) -> Plan:
    """Fill `folder` with the compressed model; returns the plan that it holds."""
    resolved = resolve(result.found.plan, job.layout)
    plan = result.plan.with_provenance(
        nbytes=resolved.file_nbytes, recipe=job.recipe.model_dump(mode="json"),
        calibration=Path(job.calibration).name,
        calibration_digest=digest(result.text.digests) if result.text else None, seed=job.seed,
    )  # fmt: skip
    writer = Writer(folder, job.layout, plan)
    copy_weights(result.applied.folder, writer, adapter_tensors(result.recovered.pairs) if result.recovered else {})
    writer.finish()
    write_file(folder, RECIPE_FILE, job.recipe.to_yaml())
    if result.recovered is not None:
        write_file(folder, TUNING_FILE, result.recovered.record())
    _pictures(job, result, plan, folder)
    c = job.checkpoint
    write_file(folder, "README.md", model_card(c.model_id, c.license, job.layout, plan, job.calibration))
    write_file(folder, RUN_FILE, run_record(job, result, plan, resolved).model_dump_json(indent=1) + "\n")
    _sidecars(job, folder)
    return plan


def _pictures(job: Job, result: Result, plan: Plan, folder: Path) -> None:
    trials = trials_of(result.found.tried)
    if trials:
        write_file(folder, "trials.csv", table(trials))
        write_file(folder, "trials.png", picture(trials, result.budget_nbytes))
        for at in best(trials):
            write_file(folder, f"pareto/trial-{at + 1}.json", trials[at].plan.to_json())
    if result.found.curve:
        curve, high = result.found.curve, job.steps.search.high
        write_file(folder, "training.csv", training.table(curve))
        write_file(folder, "training.png", training.picture(job.layout, plan, high, curve))


def _sidecars(job: Job, folder: Path) -> None:
    """Tokenizer, chat template, generation config, licence."""
    sidecars = job.checkpoint.sidecars()
    for path in sidecars:
        target = folder / path.relative_to(job.checkpoint.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if not any(path.name.startswith("tokenizer") for path in sidecars):
        job.checkpoint.tokenizer().save_pretrained(folder)
