"""The zero-shot tasks and their files.

lm-eval defines `acc` (the likeliest choice) for every task, and `acc_norm` (log-likelihood divided by the length of the
choice in characters) for PIQA, HellaSwag, ARC and OpenBookQA. The headline is `acc_norm` if there is one, else `acc`
(BoolQ, WinoGrande); both are kept.
"""

import gzip
import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from trimbit.errors import DataError
from trimbit.schema.evaluation import Score, TaskScore


@dataclass(frozen=True, slots=True)
class Source:
    """Where lm-eval defines a task, and the local file of the split that it evaluates."""

    config: str  # path in lm-eval's folder of tasks
    stem: str
    split: Literal["validation", "test"]
    fields: tuple[str, ...]  # required in each row


ARC = ("question", "choices", "answerKey")
SOURCES = {
    "boolq": Source(
        "super_glue/boolq/default.yaml", "boolq_superglue_validation", "validation", ("passage", "question", "label")
    ),
    "piqa": Source("piqa/piqa.yaml", "piqa_validation", "validation", ("goal", "sol1", "sol2", "label")),
    "hellaswag": Source(
        "hellaswag/hellaswag.yaml",
        "hellaswag_validation_random",
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "winogrande": Source(
        "winogrande/default.yaml",
        "winogrande_xl_validation",
        "validation",
        ("sentence", "option1", "option2", "answer"),
    ),
    "arc_easy": Source("arc/arc_easy.yaml", "arc_easy_test", "test", ARC),
    "arc_challenge": Source("arc/arc_challenge.yaml", "arc_challenge_test", "test", ARC),
    "openbookqa": Source(
        "openbookqa/openbookqa.yaml", "openbookqa_test", "test", ("question_stem", "choices", "answerKey")
    ),
}


def task_keys(names: tuple[str, ...], folder: Path | None) -> list[str]:
    """What scores depend on apart from the model: lm-eval's version and the digests of local task files."""
    files = [hashlib.sha256(_file(name, folder).read_bytes()).hexdigest() for name in names if folder is not None]
    return [version("lm_eval"), *files]


def _file(name: str, folder: Path) -> Path:
    stem = SOURCES[name].stem
    for file in (folder / f"{stem}.jsonl.gz", folder / f"{stem}.jsonl"):
        if file.is_file():
            return file
    raise DataError(f"{folder} has neither {stem}.jsonl.gz nor {stem}.jsonl; the task {name} needs one of them")


def _check_rows(file: Path, fields: tuple[str, ...]) -> None:
    """Check that every row has every field: lm-eval would put the name of a missing field into the prompt."""
    number = 0
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                row = json.loads(line)
                missing = [field for field in fields if not isinstance(row, dict) or row.get(field) is None]
                if missing:
                    raise DataError(f"{file}, line {number}: the row has no {', '.join(missing)}")
    except json.JSONDecodeError as err:
        raise DataError(f"{file}, line {number}: not valid JSON: {err}") from err
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as err:
        raise DataError(f"{file}: cannot be read: {err}") from err
    if number == 0:
        raise DataError(f"{file} is empty")


def mean_score(found: dict[str, TaskScore]) -> Score:
    """The mean of the tasks' headline scores; its standard error treats the errors of the tasks as independent."""
    scores = [task.score for task in found.values()]
    errors = [score.stderr for score in scores if score.stderr is not None]
    return Score(
        value=sum(score.value for score in scores) / len(scores),
        stderr=math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None,
    )
