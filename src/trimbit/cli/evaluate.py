"""The command that measures a model: eval."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimbit.cli.console import print_pairs
from trimbit.cli.options import CONTEXT, AsJson, Device
from trimbit.cli.progress import reporter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trimbit.schema.evaluation import Evaluation, Score, TaskEvaluation


def eval_command(
    model: Annotated[Path, typer.Argument(help="an original model or a compressed directory")],
    text: Annotated[Path | None, typer.Option("--text", help="a .txt, .md, .raw or .jsonl file, also with .gz")] = None,
    context: Annotated[int, typer.Option("--context", help="tokens per window; N in ppl@N")] = CONTEXT,
    windows: Annotated[
        int | None, typer.Option("--windows", help="number of windows, from the start; default: all", min=1)
    ] = None,
    against: Annotated[Path | None, typer.Option("--against", help="the original model, for KL and agreement")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="zero-shot tasks of lm-eval: boolq,piqa,...")] = None,
    task_data: Annotated[
        Path | None, typer.Option("--task-data", help="folder of the tasks' files; default: lm-eval's, from the hub")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="documents per task; default: all")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16 or float32")] = "bfloat16",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure perplexity, KL to the original, bytes, memory and speed on a text, and accuracy on zero-shot tasks."""
    import torch

    from trimbit.errors import DataError
    from trimbit.evaluate.lm_eval import check_tasks, evaluate_tasks
    from trimbit.evaluate.perplexity import evaluate

    if dtype not in {"bfloat16", "float32"}:
        raise DataError(f"--dtype {dtype} is not supported; give bfloat16 or float32")
    if text is None and tasks is None:
        raise DataError("nothing to measure; give --text FILE, --tasks NAMES or both")
    if text is None and against is not None:
        raise DataError("--against needs a text to compare on; give --text FILE")
    if tasks is None and (task_data is not None or limit is not None):
        raise DataError("--task-data and --limit only apply to tasks; give --tasks NAMES")
    names = tuple(name.strip() for name in tasks.split(",")) if tasks is not None else ()
    if names:
        check_tasks(names, task_data, limit)
    found, scores = None, None
    if text is not None:
        with reporter().stage("evaluation") as progress:
            found = evaluate(
                model, text, context=context, max_windows=windows, against=against, dtype=getattr(torch, dtype),
                device=device, progress=progress,
            )  # fmt: skip
    try:
        if names:
            scores = evaluate_tasks(
                model, names, folder=task_data, max_documents=limit, dtype=getattr(torch, dtype), reporter=reporter(),
                device=device,
            )  # fmt: skip
    finally:  # if the tasks fail, what was found on the text is still printed
        if found or scores:
            _print_evaluation(model, found, scores, as_json=as_json)


def _print_evaluation(
    model: Path, found: "Evaluation | None", scores: "TaskEvaluation | None", *, as_json: bool
) -> None:
    if as_json:
        fields = found.model_dump(mode="json") if found else {}
        typer.echo(json.dumps(fields | (scores.model_dump(mode="json") if scores else {}), indent=1))
        return
    print_pairs([*(_text_rows(found) if found else ()), *(_task_rows(scores) if scores else ())], title=str(model))


def _text_rows(found: "Evaluation") -> "Iterator[tuple[str, str]]":
    from trimbit.report.run_tables import cache_text

    yield f"ppl@{found.context} on {found.text}", f"{found.ppl:.3f}"
    if found.kl is not None and found.top1_agreement is not None and found.bits_per_weight is not None:
        yield "KL to the original", f"{found.kl:.4f} nats a token"
        yield "same first choice", f"{100 * found.top1_agreement:.1f} %"
        yield "bits per weight", f"{found.bits_per_weight:.2f}"
    yield "weight files", f"{found.weight_nbytes:,} bytes"
    yield f"KV cache@{found.context}", cache_text(found.kv_cache, found.kv_cache_nbytes, found.kv_cache_bf16_nbytes)
    yield "peak memory", f"{found.peak_rss_nbytes / 1e6:.0f} MB"
    yield "prefill, decode", f"{found.prefill_tokens_per_second:.0f}, {found.decode_tokens_per_second:.1f} tokens/s"


def _task_rows(scores: "TaskEvaluation") -> "Iterator[tuple[str, str]]":
    for name, task in scores.tasks.items():
        yield f"{name}, {task.headline} of {task.documents}", _percent(task.score)
    yield "mean of the tasks", _percent(scores.task_mean)


def _percent(score: "Score") -> str:
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.1f}"
    return f"{100 * score.value:.1f}{error} %"
