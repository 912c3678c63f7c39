"""Checks of everything that a job needs, before any long computation."""

from pathlib import Path
from typing import Any

from trimbit.artifact.files import require_absent
from trimbit.calibrate.sample import NAME as SELF
from trimbit.errors import BudgetError, DataError, PlanError, RecipeError
from trimbit.evaluate.lm_eval import check_tasks
from trimbit.jobs.cache import Cache
from trimbit.jobs.progress import Reporter
from trimbit.jobs.stages import Runner
from trimbit.measure.ranking import require_samples
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.resolved import resolve
from trimbit.model.sizes import check_kv_cache
from trimbit.pipeline.damage import require_predictable
from trimbit.pipeline.job import Job
from trimbit.pipeline.oracle import problem_of
from trimbit.pipeline.recovering import examples_of
from trimbit.pipeline.text import NAMED
from trimbit.recover.tune import require_peft
from trimbit.report.plot import require_plot
from trimbit.schema.budget import Budget
from trimbit.schema.plan import Plan
from trimbit.schema.recipe import Recipe
from trimbit.search.two_formats.config import MaskedSearch
from trimbit.transform.repair.lowrank import require_rank
from trimbit.transform.rotate import require_rotatable


def open_job(
    model: str | Path, recipe: Recipe, *, calibration: str = "self", seed: int = 0, cache: Path | None = None,
    reporter: Reporter | None = None, threads: int | None = None, device: str = "auto",
) -> Job:  # fmt: skip
    """Open a model for a recipe.

    Args:
        model: a directory with config.json and safetensors, or a `.gguf` file.
        recipe: as read by `pipeline.recipes.load_recipe`.
        calibration: `self` (text sampled from the model), `builtin` (text of the package) or a file.
        seed: seeds all random numbers.
        cache: where finished stages are kept; default `$TRIMBIT_CACHE` or `~/.cache/trimbit`.
        reporter: shows progress; default nothing.
        threads: number of threads for sampling text; default PyTorch's.
        device: `auto` (the GPU if there is one with enough memory), `cpu`, `cuda` or `cuda:1`.

    Raises:
        TrimbitError: if the model cannot be read or is not complete, or the recipe or the text is not valid.
    """
    runner = Runner(Cache(cache), reporter) if reporter is not None else Runner(Cache(cache))
    more: dict[str, Any] = {} if threads is None else {"threads": threads}
    job = Job(
        checkpoint=open_checkpoint(model), recipe=recipe, calibration=calibration, seed=seed, runner=runner,
        device_name=device, **more,
    )  # fmt: skip
    job.checkpoint.tokenizer()  # needed for the text and the compressed directory
    _check_recipe(job)
    _check_text(job)
    _ = job.device
    return job


def preflight(job: Job, budget: Budget | None, out: Path | None = None) -> int:
    """Check all that a job needs; returns the budget in bytes, or the recipe's default size if there is none.

    Raises:
        BudgetError: if the budget is not feasible, naming the smallest that is; or if it is missing and has no default.
        LayoutError: if the recipe asks for a rotation that the model's norms do not allow.
        PlanError: if the recipe asks for a cache or a rotation that the model cannot have.
        RecipeError: if low-rank pairs do not fit a weight, or an optional package is not installed.
        ArtifactError: if the output exists.
        DataError: if the text or the tasks' data cannot be used.
    """
    if out is not None:
        require_absent(out)
    if job.recipe.rotation is not None:
        require_rotatable(job.layout)
    check_kv_cache(job.recipe.kv_cache, job.layout.config)
    if job.steps.method.draws:
        require_plot()
    for weight in job.layout.weights.values() if job.rank else ():
        unit = job.layout.units[weight.unit]
        if unit.block is not None:
            require_rank(job.rank, *job.layout.weight_shape(weight, job.space.kept.get(unit.dim or "")))
    require_training(job)
    require_predictable(job)
    if job.objective is not None and job.objective.tasks:
        folder = job.objective.data
        check_tasks(job.objective.tasks, Path(folder) if folder else None, job.objective.documents)
    budget_nbytes = _nbytes(job, budget)
    job.steps.method.require_feasible(problem_of(job, budget_nbytes), job.steps.search)
    if job.needs_text and job.calibration != SELF:
        require_rows(job)
    return budget_nbytes


def _nbytes(job: Job, budget: Budget | None) -> int:
    if budget is not None:
        return budget.nbytes(job.layout.parameters)
    default = job.steps.method.default_nbytes
    if default is None:
        raise BudgetError(f"search {job.recipe.search.name} needs a budget: give --budget, such as 0.3x")
    return default(problem_of(job, 0), job.steps.search)


def require_rows(job: Job) -> None:
    """Refuse a text that is too short.

    Raises:
        DataError: naming the fields that ask for rows.
    """
    want = job.recipe.calibration
    try:
        job.read  # noqa: B018 - read for its errors; kept for the job
    except DataError as err:
        uses = {
            "calibration.rows": want.rows, "calibration.training": want.training,
            "calibration.held_out": want.held_out, "measure.rows": job.damage_rows, "calibration.report": want.report,
        }  # fmt: skip
        parts = " + ".join(f"{count} for {name}" for name, count in uses.items() if count)
        raise DataError(f"{err} (the rows are {parts})") from err


def require_training(job: Job) -> None:
    """Refuse to train without PEFT, or on data that cannot be read."""
    if job.steps.tune is not None:
        require_peft()
        if job.steps.tune.data is not None:
            examples_of(job, None)


def require_own(job: Job, plan: Plan) -> None:
    """Refuse a plan of another model, or one that this recipe cannot apply.

    Raises:
        PlanError: saying why.
    """
    if (plan.model.config_hash, plan.model.weights_hash) != (job.model.config_hash, job.model.weights_hash):
        raise PlanError(
            f"the plan belongs to {plan.model.id} (weights {plan.model.weights_hash[:12]}), "
            f"not to {job.model.id} (weights {job.model.weights_hash[:12]})"
        )
    resolve(plan, job.layout)
    advice = "apply it with the recipe that found it (--recipe)"
    if plan.adapters and job.steps.lowrank is None:
        raise PlanError(f"the plan has low-rank pairs, but the recipe has no `lowrank`: {advice}")
    if job.steps.tune is not None and not plan.adapters:
        raise PlanError(f"the recipe trains low-rank pairs, but the plan has none: {advice}")
    if plan.rotation != job.recipe.rotation:
        raise PlanError(f"the plan's rotation is {plan.rotation}, the recipe's {job.recipe.rotation}: {advice}")
    if plan.biases and (job.steps.repair is None or not job.needs_moments):
        raise PlanError(f"the plan refits {len(plan.biases)} weights, but the recipe fits nothing: {advice}")


def _check_recipe(job: Job) -> None:
    """Refuse steps that do not go together."""
    recipe, steps, method = job.recipe, job.steps, job.steps.method
    if steps.tune is not None and steps.lowrank is None:
        raise RecipeError("`tune` trains low-rank pairs: the recipe needs a `lowrank` too")
    if steps.tune is not None and steps.tune.loss == "instruct" and steps.tune.data is None:
        raise RecipeError("tune.loss instruct needs tune.data, a .jsonl file with `instruction` and `output`")
    if job.objective is not None and job.objective.steps and steps.tune is None:
        raise RecipeError("search.objective.steps trains low-rank pairs: the recipe needs a `tune`")
    if recipe.rotation is not None and recipe.criterion is not None:
        raise RecipeError("`rotation` mixes the channels that a `criterion` would rank and cut: leave out one of them")
    if recipe.rotation is not None and recipe.tune is not None:
        raise RecipeError("`tune` cannot train low-rank pairs on rotated inputs: leave out `tune` or `rotation`")
    for name in method.needs:
        if getattr(recipe, name) is None:
            raise RecipeError(f"search {recipe.search.name} needs a `{name}` in the recipe")
    if "space" in method.needs and recipe.space is not None:
        for name in ("formats", "embedding_formats"):
            if not getattr(recipe.space, name):
                raise RecipeError(f"space.{name} is empty: search {recipe.search.name} has nothing to choose from")
    if recipe.prune is not None and recipe.criterion is None:
        raise RecipeError("`prune` needs a `criterion` in the recipe, to say what goes first")


def _check_text(job: Job) -> None:
    """Refuse steps that ask for more text than there is, before any text is read."""
    want, measured, criterion = job.recipe.calibration, job.recipe.measure, job.steps.criterion
    positions = getattr(job.checkpoint.config, "max_position_embeddings", None)
    if job.needs_text and positions is not None and want.length > positions:
        raise RecipeError(f"calibration.length is {want.length} tokens, but the model has {positions} positions")
    if measured is not None and measured.length > want.length:
        raise RecipeError(
            f"measure.length is {measured.length} tokens, but a row has {want.length}: raise calibration.length"
        )
    if criterion is not None and criterion.module.READS == "gradients":
        require_samples(criterion.config, want.rows, want.length)
    if isinstance(job.steps.search, MaskedSearch):
        _check_masks(job, job.steps.search)
    if job.calibration not in NAMED and not Path(job.calibration).is_file():
        raise DataError(f"no calibration text {job.calibration!r}: give `self`, `builtin` or a file")


def _check_masks(job: Job, config: MaskedSearch) -> None:
    want = job.recipe.calibration
    if config.length > want.length:
        raise RecipeError(
            f"search.length is {config.length} tokens, but a row has {want.length}: raise calibration.length"
        )
    rows = (want.training or want.rows) * (want.length // config.length)
    if config.compared(rows) > rows:
        raise RecipeError(f"search.rows: {config.compared(rows)} of {rows} rows asked; raise calibration.training")
