"""The command line: compress, plan, apply, eval, show, recipes. Results on stdout, progress and errors on stderr."""

import json
import logging
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError

from trimbit.errors import TrimbitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trimbit.evaluate import Evaluation
    from trimbit.model.layout import Layout
    from trimbit.pipeline import Session
    from trimbit.plan import Budget, Plan
    from trimbit.precision import KVPrecision
    from trimbit.recipe import Recipe
    from trimbit.tasks import Score, TaskEvaluation

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
CONTEXT = 2048  # tokens; of windows, and what a cache is counted at
INTERRUPTED = 130  # 128 + SIGINT, as shells count
stdout, stderr = Console(), Console(stderr=True)

Model = Annotated[Path, typer.Argument(help="a directory with config.json and safetensors, or a .gguf file")]
Out = Annotated[Path, typer.Argument(help="the directory or file to write")]
BudgetText = Annotated[
    str | None,
    typer.Option("--budget", help="limit on the weight files: 45MB, 45MiB, 2.5bpw or 0.2x; default the recipe's own"),
]
RecipeName = Annotated[str, typer.Option("--recipe", help="the name of a recipe, or a .yaml file")]
Calibration = Annotated[
    str, typer.Option("--calibration", help="`self` (sampled from the model) or a .txt, .jsonl or .jsonl.gz file")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a recipe's parameter: stage.parameter=value")
]
Seed = Annotated[int, typer.Option("--seed", help="of everything random")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="check everything and estimate size, memory and time; write nothing")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


class Bars:
    """Progress as bars on stderr."""

    def __init__(self) -> None:
        self.open: Progress | None = None

    @contextmanager
    def stage(self, name: str) -> "Iterator[Callable[[int, int], None]]":
        """A bar for one stage; a stage inside another one has its bar below."""
        with self._progress() as progress:
            task = progress.add_task(name, total=None)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            yield advance

    @contextmanager
    def _progress(self) -> "Iterator[Progress]":
        if self.open is not None:
            yield self.open
            return
        columns = (
            TextColumn("{task.description:<32}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=stderr) as self.open:
            try:
                yield self.open
            finally:
                self.open = None


def _session(model: Path, recipe: "Recipe", calibration: str, seed: int) -> "Session":
    from trimbit.pipeline import open_session

    return open_session(model, recipe, calibration=calibration, seed=seed, reporter=Bars())


def _version(asked: bool) -> bool:
    if asked:
        import trimbit

        typer.echo(trimbit.__version__)
        raise typer.Exit
    return asked


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="print it", is_eager=True, callback=_version)] = False,
) -> None:
    """Fit a language model to a budget."""


@app.command()
def compress(
    model: Model, out: Out, budget: BudgetText = None, recipe: RecipeName = "knapsack",
    calibration: Calibration = "self", overrides: Overrides = None, seed: Seed = 0, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Find the best model within a budget and write it."""
    from trimbit.artifact import require_absent
    from trimbit.pipeline import compress as run
    from trimbit.plan import Budget
    from trimbit.recipe import load_recipe

    limit = Budget.parse(budget) if budget is not None else None
    require_absent(out)
    session = _session(model, load_recipe(recipe, tuple(overrides or ())), calibration, seed)
    if dry_run:
        _estimate(session, limit)
        return
    plan = run(session, limit, out)
    print_summary(session.layout, plan, session.limit(limit), out)


@app.command()
def plan(
    model: Model, out: Out, budget: BudgetText = None, recipe: RecipeName = "knapsack",
    calibration: Calibration = "self", overrides: Overrides = None, seed: Seed = 0, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Find the best plan within a budget and write it as JSON."""
    from trimbit.artifact import require_absent
    from trimbit.plan import Budget
    from trimbit.recipe import load_recipe

    limit = Budget.parse(budget) if budget is not None else None
    require_absent(out, file=True)
    session = _session(model, load_recipe(recipe, tuple(overrides or ())), calibration, seed)
    if dry_run:
        _estimate(session, limit)
        return
    found = session.find_plan(limit)
    found.save(out)
    print_summary(session.layout, found, session.limit(limit), out)


@app.command(name="apply")
def apply_command(
    model: Model, plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan.json")], out: Out,
    recipe: Annotated[str | None, typer.Option("--recipe", help="another one than the plan was found by")] = None,
    calibration: Annotated[str | None, typer.Option("--calibration", help="`self`, or the text's file")] = None,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option("--seed", help="another one than the plan was found with")] = None,
) -> None:  # fmt: skip
    """Apply a plan to a model and write the compressed directory, by the recipe that the plan was found by."""
    from trimbit.artifact import require_absent
    from trimbit.errors import PlanError
    from trimbit.plan import load_plan
    from trimbit.recipe import load_recipe, read_recipe

    require_absent(out)
    found, own = load_plan(plan_file), tuple(overrides or ())
    by = found.found_by
    resolved = read_recipe(by.recipe, str(plan_file), own) if recipe is None else load_recipe(recipe, own)
    session = _session(model, resolved, calibration or "self", by.seed if seed is None else seed)
    if calibration is None and by.calibration != "self" and session.judges_plans:
        raise PlanError(f"the plan was found on {by.calibration}: give that file, or another text (--calibration)")
    written = session.write(found, out)
    print_summary(session.layout, written, session.layout.file_nbytes(written), out)


@app.command(name="eval")
def eval_command(
    model: Annotated[Path, typer.Argument(help="an original model or a compressed directory")],
    text: Annotated[Path | None, typer.Option("--text", help="a .txt, .raw, .jsonl or .jsonl.gz file")] = None,
    context: Annotated[int, typer.Option("--context", help="tokens in a window; the perplexity's name")] = CONTEXT,
    windows: Annotated[
        int | None, typer.Option("--windows", help="how many, from the start; default all", min=1)
    ] = None,
    against: Annotated[Path | None, typer.Option("--against", help="the original model, for KL and agreement")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="zero-shot tasks of lm-eval: boolq,piqa,...")] = None,
    task_data: Annotated[
        Path | None, typer.Option("--task-data", help="the folder of the tasks' files; default lm-eval's, from the hub")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="documents a task, the first; default all")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16 or float32")] = "bfloat16",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure perplexity, KL to the original, bytes, memory and speed on a text; accuracy on zero-shot tasks."""
    import torch

    from trimbit.errors import DataError
    from trimbit.evaluate import evaluate
    from trimbit.tasks import check_tasks, evaluate_tasks

    if dtype not in {"bfloat16", "float32"}:
        raise DataError(f"--dtype {dtype}: give bfloat16 or float32")
    if text is None and tasks is None:
        raise DataError("nothing to measure; give --text FILE, --tasks NAMES or both")
    if text is None and against is not None:
        raise DataError("--against compares on a text; give --text FILE")
    if tasks is None and (task_data is not None or limit is not None):
        raise DataError("--task-data and --limit belong to tasks; give --tasks NAMES")
    names = tuple(name.strip() for name in tasks.split(",")) if tasks is not None else ()
    if names:
        check_tasks(names, task_data, limit)
    found, scores = None, None
    if text is not None:
        with Bars().stage("evaluation") as progress:
            found = evaluate(
                model, text, context=context, limit=windows, against=against, dtype=getattr(torch, dtype),
                progress=progress,
            )  # fmt: skip
    try:
        if names:
            scores = evaluate_tasks(
                model, names, folder=task_data, limit=limit, dtype=getattr(torch, dtype), reporter=Bars()
            )
    finally:  # if the tasks fail, what was found on the text is told
        if found or scores:
            _print_evaluation(model, found, scores, as_json=as_json)


def _print_evaluation(
    model: Path, found: "Evaluation | None", scores: "TaskEvaluation | None", *, as_json: bool
) -> None:
    if as_json:
        fields = found.model_dump(mode="json") if found else {}
        typer.echo(json.dumps(fields | (scores.model_dump(mode="json") if scores else {}), indent=1))
        return
    table = Table(show_header=False, title=str(model))
    for what, value in [*(_text_rows(found) if found else ()), *(_task_rows(scores) if scores else ())]:
        table.add_row(what, value)
    stdout.print(table)


def _text_rows(found: "Evaluation") -> "Iterator[tuple[str, str]]":
    yield f"ppl@{found.context} on {found.text}", f"{found.ppl:.3f}"
    if found.kl is not None and found.top1_agreement is not None and found.bits_per_weight is not None:
        yield "KL to the original", f"{found.kl:.4f} nats a token"
        yield "same first choice", f"{100 * found.top1_agreement:.1f} %"
        yield "bits per weight", f"{found.bits_per_weight:.2f}"
    yield "weight files", f"{found.weight_nbytes:,} bytes"
    yield f"KV cache@{found.context}", _cache_text(found.kv_cache, found.kv_cache_nbytes, found.kv_cache_bf16_nbytes)
    yield "peak memory", f"{found.peak_rss_nbytes / 1e6:.0f} MB"
    yield "prefill, decode", f"{found.prefill_tokens_per_second:.0f}, {found.decode_tokens_per_second:.1f} tokens/s"


def _cache_text(precision: "KVPrecision | None", nbytes: int, bf16: int) -> str:
    """Bytes of a cache, and those of the same model's cache in bf16."""
    if precision is None:
        return f"{nbytes:,} bytes in bf16"
    return f"{nbytes:,} bytes, {bf16:,} in bf16 ({precision.label})"


def _task_rows(scores: "TaskEvaluation") -> "Iterator[tuple[str, str]]":
    for name, task in scores.tasks.items():
        yield f"{name}, {task.headline} of {task.documents}", _percent(task.score)
    yield "mean of the tasks", _percent(scores.task_mean)


def _percent(score: "Score") -> str:
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.1f}"
    return f"{100 * score.value:.1f}{error} %"


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="a compressed directory")],
    context: Annotated[int, typer.Option("--context", help="tokens that the cache is counted at", min=1)] = CONTEXT,
    as_json: AsJson = False,
) -> None:
    """Print the plan: kept groups of heads and channels, the bits of each weight, bytes, also of the cache."""
    from transformers import AutoConfig

    import trimbit  # noqa: F401 - makes the config known
    from trimbit.artifact import PLAN_FILE, is_compressed, weight_nbytes
    from trimbit.errors import ArtifactError
    from trimbit.model.layout import build_layout
    from trimbit.plan import load_plan

    if not is_compressed(path):
        raise ArtifactError(f"{path} is not a compressed directory")
    found = load_plan(path / PLAN_FILE)
    layout = build_layout(AutoConfig.from_pretrained(path, local_files_only=True).original())
    if weight_nbytes(path) != layout.file_nbytes(found):
        raise ArtifactError(
            f"{path}: the weight files have {weight_nbytes(path):,} bytes, the plan says "
            f"{layout.file_nbytes(found):,}: they are damaged or not the plan's; write the directory again"
        )
    rows = plan_rows(layout, found)
    if as_json:
        cache = cache_fields(layout, found, context)
        told = {"found_by": found.found_by.model_dump(mode="json"), "kv_cache": cache, "units": rows}
        typer.echo(json.dumps(told, indent=1))
        return
    table = Table(title=f"{path}: {found.found_by.method}, {layout.file_nbytes(found):,} bytes")
    for column in ("unit", "kept", "formats", "bytes", "share"):
        table.add_column(column, justify="left" if column in {"unit", "formats"} else "right")
    for row in rows:
        table.add_row(row["unit"], row["kept"], row["formats"], f"{row['nbytes']:,}", f"{100 * row['share']:.1f} %")
    stdout.print(table)
    stdout.print(cache_line(layout, found, context), highlight=False)
    for note in found.found_by.notes:
        stdout.print(note, highlight=False)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="one of them, or a .yaml file, to see every parameter")] = None,
    overrides: Overrides = None,
) -> None:
    """List the recipes; or print one with all that `--set` can change, and its defaults."""
    import yaml

    from trimbit.recipe import load_recipe, names

    if name is not None:
        from trimbit.preparation import spelled_out

        fields = spelled_out(load_recipe(name, tuple(overrides or ())))
        typer.echo(yaml.safe_dump(fields, sort_keys=False, width=120), nl=False)
        return
    table = Table(show_header=False)
    for each in names():
        table.add_row(each, load_recipe(each).description)
    stdout.print(table)


def cache_fields(layout: "Layout", plan: "Plan", context: int) -> dict[str, Any]:
    """How keys and values are stored, and their bytes at this many tokens, batch 1; and if all were bf16."""
    from trimbit.model.cache_size import cache_nbytes

    nbytes, bf16 = (cache_nbytes(layout.config, plan.widths, kind, context) for kind in (plan.kv_cache, None))
    precision = plan.kv_cache.model_dump(mode="json") if plan.kv_cache else None
    return {"precision": precision, "context": context, "nbytes": nbytes, "bf16_nbytes": bf16}


def cache_line(layout: "Layout", plan: "Plan", context: int) -> str:
    """The same in a line."""
    fields = cache_fields(layout, plan, context)
    return f"KV cache@{context}: {_cache_text(plan.kv_cache, fields['nbytes'], fields['bf16_nbytes'])}"


def plan_rows(layout: "Layout", plan: "Plan") -> list[dict[str, Any]]:
    """One row a unit: what is kept of it, in which formats, in how many bytes."""
    total = layout.tensor_nbytes(plan)
    rows: list[dict[str, Any]] = []
    tensors = layout.units_tensors(plan)
    for unit in layout.units.values():
        width = layout.width(unit, plan)
        nbytes = sum(spec.nbytes for spec in tensors[unit.name].values())
        formats: dict[str, list[str]] = {}
        for name in unit.weights if not layout.dropped(unit, plan) else ():
            label = "+".join(
                f"{run.count}x{run.precision.name}" if len(plan.weights[name]) > 1 else run.precision.name
                for run in plan.weights[name]
            )
            formats.setdefault(label, []).append(layout.weights[name].role.removesuffix("_proj"))
        rows.append(
            {
                "unit": unit.name,
                "kept": f"{width}/{unit.size}" if unit.dim else "",
                "formats": "  ".join(f"{' '.join(roles)}: {label}" for label, roles in formats.items()) or "dropped",
                "nbytes": nbytes,
                "share": nbytes / total,
            }
        )
    return rows


def print_summary(layout: "Layout", plan: "Plan", limit: int, out: Path) -> None:
    """What was decided, in a few lines."""
    found = plan.found_by
    nbytes = layout.file_nbytes(plan)
    cut = [dim for dim in plan.cuts if len(plan.cuts[dim]) < layout.unit_of_dim(dim).size]
    pruned = f"{len(cut)} of {2 * layout.blocks} sub-blocks cut" if cut else "no pruning was chosen"
    share, bits = 100 * nbytes / limit, 8 * nbytes / layout.parameters
    stdout.print(f"{out}: {nbytes:,} bytes of {limit:,} ({share:.2f} %), {bits:.2f} bits a parameter", highlight=False)
    stdout.print(f"{found.method}; {pruned}", highlight=False)
    if found.measured_damage is not None:
        stdout.print(
            f"KL to the original on held-out calibration tokens: {found.measured_damage:.4f} nats a token",
            highlight=False,
        )
    if plan.kv_cache is not None:
        stdout.print(cache_line(layout, plan, CONTEXT), highlight=False)
    for note in found.notes:
        stdout.print(note, highlight=False)


def _estimate(session: "Session", budget: "Budget | None") -> None:
    """What a run would take: bytes exactly bounded, memory and time from sizes."""
    from trimbit.estimate import estimate

    table = Table(show_header=False, title="dry run: nothing was written")
    for what, value in estimate(session, budget):
        table.add_row(what, value)
    stdout.print(table)


def main() -> None:
    """Run the command line; errors are one line and an exit code, an interrupt leaves nothing behind."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer catches Ctrl-C
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except TrimbitError as err:
        _fail(str(err), err.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; finished stages are kept in the cache and are reused", INTERRUPTED)
    except OSError as err:
        _fail(f"{err.filename or 'file'}: {err.strerror or err}", 1)
    except SafetensorError as err:
        from trimbit.cache import cache_root

        _fail(
            f"the cache {cache_root()} cannot be written, or a file in it is damaged ({err}); free space or remove it",
            1,
        )
    except Exception as err:
        if hasattr(err, "format_message"):  # click's own errors about the arguments; without any, it shows the help
            _fail(err.format_message(), 2) if err.format_message() else sys.exit(2)
        if type(err).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            _fail(f"{str(err).splitlines()[0]} Finished stages are kept in the cache and are reused", 1)
        raise


def _fail(message: str, code: int) -> None:
    stderr.print(f"trimbit: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
