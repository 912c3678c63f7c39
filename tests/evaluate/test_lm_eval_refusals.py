"""What the tasks refuse."""

import math
import random

import pytest

from task_files import DOCUMENTS, run, write
from tiny import tiny_model
from trimbit.errors import DataError, NumericsError
from trimbit.evaluate import lm_eval
from trimbit.evaluate.lm_eval import check_tasks

for package in lm_eval.NEEDS:
    pytest.importorskip(package)

rng = random.Random(0)


def words(count):
    return " ".join(f"w{rng.randrange(3, 96)}" for _ in range(count))


def test_unknown_tasks(job, folder):
    for names in (["piqa", "mmlu"], [""], []):
        with pytest.raises(DataError, match=r"no task '.*'; known are boolq, piqa, .*, openbookqa$"):
            run(job.model, names, folder)


def test_missing_files(job, folder, tmp_path):
    with pytest.raises(DataError, match=r"none has neither piqa_validation\.jsonl\.gz nor .*; the task piqa needs"):
        run(job.model, ["piqa"], tmp_path / "none")
    write(tmp_path, "boolq", DOCUMENTS["boolq"])
    with pytest.raises(DataError, match=r"neither arc_easy_test\.jsonl\.gz nor arc_easy_test\.jsonl; the task arc"):
        run(job.model, ["boolq", "arc_easy"], tmp_path)
    with pytest.raises(DataError, match="limit of documents is 0"):
        run(job.model, ["boolq"], tmp_path, limit=0)


GOOD = DOCUMENTS["piqa"][0]


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("piqa", {key: value for key, value in GOOD.items() if key != "sol2"}, ["line 2: the row has no sol2"]),
        ("piqa", GOOD | {"goal": None, "label": None}, ["line 2: the row has no goal, label"]),
        ("piqa", [1, 2], ["line 2: the row has no goal, sol1, sol2, label"]),
        ("piqa", GOOD | {"label": 2}, ["row 2", "target 2 is not one of the 2 choices"]),
        ("piqa", GOOD | {"label": -1}, ["row 2", "target -1 is not one of the 2 choices"]),
        ("piqa", GOOD | {"label": "one"}, ["one"]),
        ("winogrande", DOCUMENTS["winogrande"][0] | {"answer": "3"}, ["KeyError: '3'"]),
        ("arc_easy", DOCUMENTS["arc_easy"][0] | {"answerKey": "E"}, ["'E' is not in list"]),
    ],
)
def test_malformed_rows(job, tmp_path, name, row, words):
    file = write(tmp_path, name, [DOCUMENTS[name][0], row])
    with pytest.raises(DataError) as caught:
        run(job.model, [name], tmp_path)
    for word in [str(file), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files(job, tmp_path):
    file = write(tmp_path, "piqa", [GOOD])
    for content, words in ((b"", "is empty"), (b"{\n", "line 1: not valid JSON"), (b"\xff\xff\n", "cannot be read")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=words):
            check_tasks(("piqa",), tmp_path)
    file = write(tmp_path, "piqa", [GOOD] * 9, ".jsonl.gz")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"jsonl\.gz: cannot be read"):
        check_tasks(("piqa",), tmp_path)


def test_the_hub_cannot_be_reached(job):
    with pytest.raises(
        DataError,
        match=r"piqa: lm-eval cannot use .*[Oo]ffline.*\(--task-data, or search.objective.data in a recipe\)$",
    ):
        run(job.model, ["piqa"], None)


def test_without_lm_eval(job, folder, monkeypatch):
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None if name == "lm_eval" else object())
    with pytest.raises(DataError, match=r"pip install 'trimbit\[eval\]'"):
        run(job.model, ["piqa"], folder)


def test_a_model_that_overflows(job, folder, monkeypatch):
    model = tiny_model("llama")
    model.get_output_embeddings().weight.data[:] = math.nan
    monkeypatch.setattr(lm_eval, "load_model", lambda *_: model)
    with pytest.raises(NumericsError, match=r"piqa: the log-probability of .* is nan"):
        run(job.model, ["piqa"], folder)
