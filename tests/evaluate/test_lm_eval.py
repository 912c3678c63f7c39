"""Zero-shot tasks: lm-eval on files of ours against log-likelihoods summed here, and data that cannot be used."""

import logging
import math
import os
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import BUDGET
from sessions import open_session
from task_files import DOCUMENTS, run
from trimbit.evaluate import lm_eval
from trimbit.evaluate.tasks import SOURCES
from trimbit.pipeline.recipes import load_recipe
from trimbit.schema.budget import Budget

for package in lm_eval.NEEDS:
    pytest.importorskip(package)

REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "tasks"


ROWS = 12


def log_likelihood(model, tokenizer, context, continuation):
    """Summed over the continuation's tokens, one prompt at a time."""
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + continuation, return_tensors="pt").input_ids
    with torch.inference_mode():
        log_p = model(ids).logits[0, :-1].log_softmax(-1)
    return sum(float(log_p[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def naive_piqa(model, tokenizer, rows):
    """(acc, acc_norm)."""
    right, right_norm = 0, 0
    for row in rows:
        options = [row["sol1"], row["sol2"]]
        prompt = f"Question: {row['goal']}\nAnswer:"
        found = [log_likelihood(model, tokenizer, prompt, f" {option}") for option in options]
        normed = [value / len(option) for value, option in zip(found, options, strict=True)]
        right += found.index(max(found)) == row["label"]
        right_norm += normed.index(max(normed)) == row["label"]
    return right / len(rows), right_norm / len(rows)


def naive_winogrande(model, tokenizer, rows):
    right = 0
    for row in rows:
        before, after = row["sentence"].split("_")
        found = [log_likelihood(model, tokenizer, before + row[option], after) for option in ("option1", "option2")]
        right += str(1 + found.index(max(found))) == row["answer"]
    return right / len(rows)


@pytest.fixture(scope="module")
def compressed(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("zero-shot") / "small"
    session = open_session(
        job.model, load_recipe(str(job.recipe), ("measure.apply_finalists=false",)), calibration=str(job.text)
    )
    session.compress(Budget.parse(BUDGET), out)
    return out


@pytest.mark.parametrize("kind", ["original", "compressed"])
def test_accuracy_is_that_of_summed_log_likelihoods(job, compressed, folder, kind):
    path = job.model if kind == "original" else compressed
    found = run(path, ["piqa", "winogrande"], folder)
    piqa, winogrande = found.tasks["piqa"], found.tasks["winogrande"]
    assert (piqa.acc.value, piqa.acc_norm.value) == naive_piqa(*loaded(path), DOCUMENTS["piqa"])
    assert piqa.acc != piqa.acc_norm
    assert winogrande.acc.value == naive_winogrande(*loaded(path), DOCUMENTS["winogrande"])
    assert winogrande.acc_norm is None


def test_the_limit_takes_the_first_documents(job, folder):
    found = run(job.model, ["piqa"], folder, limit=5)
    piqa = found.tasks["piqa"]
    assert (piqa.acc.value, piqa.acc_norm.value) == naive_piqa(*loaded(job.model), DOCUMENTS["piqa"][:5])
    assert (piqa.documents, found.task_limit) == (5, 5)
    assert run(job.model, ["piqa"], folder, limit=1).tasks["piqa"].acc.stderr is None
    assert run(job.model, ["piqa"], folder, limit=1).task_mean.stderr is None


def test_all_tasks(job, folder):
    found = run(job.model, SOURCES, folder)
    assert list(found.tasks) == list(SOURCES)
    assert {name: task.headline for name, task in found.tasks.items()} == {
        "boolq": "acc", "piqa": "acc_norm", "hellaswag": "acc_norm", "winogrande": "acc", "arc_easy": "acc_norm",
        "arc_challenge": "acc_norm", "openbookqa": "acc_norm",
    }  # fmt: skip
    for task in found.tasks.values():
        assert task.documents == ROWS
        for score in filter(None, (task.acc, task.acc_norm)):
            assert score.stderr == pytest.approx(math.sqrt(score.value * (1 - score.value) / (ROWS - 1)))
        assert task.score == (task.acc if task.headline == "acc" else task.acc_norm)
        assert len(task.correct) == task.documents
        assert task.correct.count("1") / task.documents == pytest.approx(task.score.value)
    scores = [task.score for task in found.tasks.values()]
    assert found.task_mean.value == pytest.approx(sum(score.value for score in scores) / 7)
    assert found.task_mean.stderr == pytest.approx(math.sqrt(sum(score.stderr**2 for score in scores)) / 7)
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_batches_hold_a_limited_number_of_logits(job, folder, monkeypatch):
    """Whatever their size, the scores are the same."""
    whole = run(job.model, ["arc_easy"], folder)
    rows = []

    def opened(path, dtype, device):
        model = load(path, dtype, device)
        model.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))
        return model

    load = lm_eval.load_model
    monkeypatch.setattr(lm_eval, "load_model", opened)
    monkeypatch.setattr(lm_eval, "LOGITS", 96 * 50)
    small = run(job.model, ["arc_easy"], folder)
    assert small.tasks["arc_easy"].acc == whole.tasks["arc_easy"].acc
    assert small.tasks["arc_easy"].acc_norm == whole.tasks["arc_easy"].acc_norm
    assert max(batch for batch, _ in rows) > 1
    assert max(batch * length for batch, length in rows) <= 50


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the shared data")
def test_real_files(job):
    found = run(job.model, SOURCES, REAL, limit=2)
    assert {task.documents for task in found.tasks.values()} == {2}
    versions = {name: task.version for name, task in found.tasks.items()}
    assert versions == dict.fromkeys(SOURCES, "1.0") | {"boolq": "2.0"}


class Recorder:
    """Keeps what progress was reported."""

    def __init__(self):
        self.seen = {}

    @contextmanager
    def stage(self, name):
        yield lambda done, total: self.seen.setdefault(name, []).append((done, total))


def test_progress_counts_choices_and_nothing_is_printed(job, folder, capfd, caplog):
    recorder = Recorder()
    run(job.model, ["piqa", "openbookqa"], folder, limit=3, reporter=recorder)
    assert recorder.seen == {
        "piqa": [(i, 6) for i in range(1, 7)],
        "openbookqa": [(i, 12) for i in range(1, 13)],
    }
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_no_network_and_nothing_is_left_behind(job, folder, tmp_path, monkeypatch):
    import datasets
    from huggingface_hub import constants
    from tqdm import tqdm

    def refuse(*_args, **_kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setattr(datasets.config, switch, False, raising=False)
    for place in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, place, tmp_path / "cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ), vars(tqdm)["__init__"], logging.getLogger("lm_eval").level
    run(job.model, ["piqa", "hellaswag"], folder)
    assert before == (dict(os.environ), vars(tqdm)["__init__"], logging.getLogger("lm_eval").level)
    assert list(tmp_path.iterdir()) == []
