"""Zero-shot tasks run by lm-eval, with its prompts, targets and metrics, on documents from local files or the hub.

Log-probabilities are computed in fp32. A prompt longer than the model's context loses its start, as always in lm-eval.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import yaml
from transformers import PreTrainedModel

from trimbit.artifact.files import held_nbytes
from trimbit.errors import DataError, NumericsError
from trimbit.evaluate.tasks import SOURCES, _check_rows, _file, mean_score
from trimbit.jobs.hardware import hardware
from trimbit.jobs.progress import Progress, Reporter
from trimbit.model.forward.compute import fast_bf16, named_device
from trimbit.runtime.load import load_model, load_tokenizer
from trimbit.schema.evaluation import Score, TaskEvaluation, TaskScore

NEEDS = ("lm_eval", "datasets", "accelerate")
LOGITS = 2**27  # per batch; for a vocabulary of 49,152 these are 2,730 tokens, and 0.8 GB in bf16 plus fp32
BATCH = 16  # at most: a larger batch pads more and is no faster


def check_tasks(names: tuple[str, ...], folder: Path | None, max_documents: int | None = None) -> None:
    """Check early that the tasks can be run.

    Raises:
        DataError: if lm-eval is not installed, a name is unknown, `max_documents` is below 1, a file is missing or
            malformed, or there is no folder and lm-eval cannot get its data sets.
    """
    if any(find_spec(package) is None for package in NEEDS):
        raise DataError("zero-shot tasks need the package lm-eval: pip install 'trimbit[eval]'")
    if max_documents is not None and max_documents < 1:
        raise DataError(f"the limit of documents is {max_documents}, but must be at least 1")
    for name in names or ("",):
        if name not in SOURCES:
            raise DataError(f"no task {name!r}; known are {', '.join(SOURCES)}")
        if folder is not None:
            _check_rows(_file(name, folder), SOURCES[name].fields)
    if folder is None:
        with _quiet(), TemporaryDirectory(prefix="trimbit-tasks-") as scratch:
            for name in names:
                _open_task(name, None, 1, Path(scratch))


def evaluate_tasks(
    path: Path, names: tuple[str, ...], *, folder: Path | None, max_documents: int | None, dtype: torch.dtype,
    reporter: Reporter, device: str = "auto",
) -> TaskEvaluation:  # fmt: skip
    """Run a model, original or compressed, over zero-shot tasks.

    Args:
        path: the model.
        names: of the tasks, keys of `SOURCES`.
        folder: holds the tasks' files, each .jsonl or .jsonl.gz; None: lm-eval gets its data sets from the hub.
        max_documents: number of documents per task, from the first; None: all.
        dtype: in which the model is loaded.
        reporter: shows progress, one stage per task, counted in choices.
        device: where it runs: auto, cpu, cuda or cuda:1.

    Raises:
        DataError: if the tasks cannot be run (see `check_tasks`), or lm-eval cannot use their data.
        NumericsError: if a log-probability is not finite.
    """
    check_tasks(names, folder, max_documents)
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype, named_device(device, held_nbytes(path)))
    scores = score_tasks(model, tokenizer, names, folder=folder, max_documents=max_documents, reporter=reporter)
    return TaskEvaluation(
        model=str(path), task_data=str(folder) if folder else None, task_limit=max_documents,
        tasks=scores, task_mean=mean_score(scores),
        dtype=str(dtype).removeprefix("torch."), hardware=hardware(),
        versions={package: version(package) for package in ("torch", "transformers", "lm_eval")},
    )  # fmt: skip


def score_tasks(
    model: PreTrainedModel, tokenizer: Any, names: tuple[str, ...], *, folder: Path | None, max_documents: int | None,  # noqa: ANN401
    reporter: Reporter,
) -> dict[str, TaskScore]:  # fmt: skip
    """Run a model that is in memory over tasks; see `evaluate_tasks`."""
    from lm_eval.models.huggingface import HFLM

    with _quiet(), TemporaryDirectory(prefix="trimbit-tasks-") as scratch:
        tasks = {name: _open_task(name, folder, max_documents, Path(scratch)) for name in names}
        lm = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32")
        scores = {}
        for name, task in tasks.items():
            with reporter.stage(name) as progress:
                scores[name] = _run(lm, name, task, max_documents, progress)
    return scores


def _open_task(name: str, folder: Path | None, max_documents: int | None, scratch: Path) -> Any:  # noqa: ANN401
    """lm-eval's task with its requests built; only the source of the documents is ours."""
    import lm_eval.tasks

    source, file = SOURCES[name], _file(name, folder) if folder else None
    fields: dict[str, Any] = {
        "include": str(Path(lm_eval.tasks.__file__).parent / source.config),
        "num_fewshot": 0,
    }
    if file:
        fields |= {"dataset_path": "json", "dataset_name": None}
        fields |= {"training_split": None, "validation_split": None, "test_split": None}
        fields[f"{source.split}_split"] = source.split
        fields["dataset_kwargs"] = {"data_files": {source.split: str(file.absolute())}, "cache_dir": str(scratch)}
    config = scratch / f"{name}.yaml"
    config.write_text(yaml.safe_dump(fields), encoding="utf-8")
    try:
        loaded = lm_eval.tasks.TaskManager(include_defaults=False).load([str(config)])
        task = loaded["tasks"][name]
        for number, doc in task.doc_iterator(limit=max_documents):
            _check_target(task, number, doc)
        task.build_all_requests(limit=max_documents)
    except Exception as err:  # errors of lm-eval, datasets, pyarrow and jinja have no common base
        advice = "" if file else "; give a folder with its file (--task-data, or search.objective.data in a recipe)"
        raise DataError(f"{file or name}: lm-eval cannot use the data: {_reason(err)}{advice}") from err
    return task


def _check_target(task: Any, number: int, doc: dict[str, Any]) -> None:  # noqa: ANN401
    """Refuse a target that is none of the choices: lm-eval would count the document as wrong for any model."""
    choices = task.doc_to_choice(doc)
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if not isinstance(target, int) or not 0 <= target < len(choices):
        raise ValueError(f"row {number + 1}: the target {target!r} is not one of the {len(choices)} choices")


def _reason(err: BaseException) -> str:
    """The first line of the original error, which `datasets` wraps."""
    while err.__cause__ is not None:
        err = err.__cause__
    return f"{type(err).__name__}: {err}".splitlines()[0]


def _run(lm: Any, name: str, task: Any, max_documents: int | None, progress: Progress) -> TaskScore:  # noqa: ANN401
    from lm_eval.evaluator import evaluate

    started = time.perf_counter()
    longest = max(len(lm.tok_encode("".join(request.args))) for request in task.instances)
    lm.batch_size_per_gpu = max(1, min(BATCH, LOGITS // (lm.model.config.vocab_size * longest)))
    lm.set_cache_hook(_Answers(name, len(task.instances), progress))
    with fast_bf16():
        results = evaluate(lm=lm, task_dict={"tasks": {name: task}}, limit=max_documents, log_samples=True)
    found = results["results"][name]
    has_norm = "acc_norm,none" in found
    headline: Literal["acc", "acc_norm"] = "acc_norm" if has_norm else "acc"
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return TaskScore(
        documents=results["n-samples"][name]["effective"], version=str(results["versions"][name]),
        headline=headline, correct="".join(str(int(sample[headline])) for sample in samples),
        acc=_score(found, "acc"), acc_norm=_score(found, "acc_norm") if has_norm else None,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


class _Answers:
    """Stands in for lm-eval's cache: counts the answers reported to it, and stops at one that is not finite."""

    def __init__(self, name: str, total: int, progress: Progress) -> None:
        self.name, self.total, self.progress = name, total, progress
        self.done = 0

    def add_partial(self, _kind: str, request: tuple[str, str], answer: tuple[float, bool]) -> None:
        """Count an answer: the log-probability of a choice, and whether it is the greedy one."""
        if not math.isfinite(answer[0]):
            raise NumericsError(
                f"{self.name}: the log-probability of {request[1]!r} is {answer[0]}: the model overflows on its "
                "prompt; try --dtype float32"
            )
        self.done += 1
        self.progress(self.done, self.total)


def _score(found: dict[str, Any], metric: str) -> Score:
    stderr = found[f"{metric}_stderr,none"]
    return Score(value=float(found[f"{metric},none"]), stderr=None if isinstance(stderr, str) else float(stderr))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of lm-eval and datasets, which have no common switch, and all log lines but errors."""
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels, init = [logger.level for logger in loggers], tqdm.__init__
    stored = vars(tqdm)["__init__"]  # may be a partialmethod, which gives another function at each access

    def without_bar(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        init(self, *args, **(kwargs | {"disable": True}))

    for logger in loggers:
        logger.setLevel(logging.ERROR)
    tqdm.__init__ = without_bar
    try:
        yield
    finally:
        tqdm.__init__ = stored
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
