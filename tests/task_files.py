"""A few documents of each task, in the tiny model's words."""

import gzip
import json
import random

import torch

from trimbit.evaluate.lm_eval import evaluate_tasks
from trimbit.evaluate.tasks import SOURCES
from trimbit.jobs.progress import Silent

ROWS = 12


rng = random.Random(0)


def words(count):
    return " ".join(f"w{rng.randrange(3, 96)}" for _ in range(count))


def choices():
    """Of very different lengths, so that the shortest is the likeliest, but not by its length."""
    return {"text": [words(count) for count in (1, 2, 4, 8)], "label": ["A", "B", "C", "D"]}


LABELS = [rng.randrange(2) for _ in range(ROWS)]


DOCUMENTS = {
    "boolq": [{"passage": words(9), "question": words(4), "label": i % 2} for i in range(ROWS)],
    "piqa": [{"goal": words(5), "sol1": words(1 + i % 3), "sol2": words(6), "label": LABELS[i]} for i in range(ROWS)],
    "hellaswag": [
        {
            "activity_label": words(2),
            "ctx_a": words(6),
            "ctx_b": "",
            "endings": choices()["text"],
            "label": str(i % 4),
        }
        for i in range(ROWS)
    ],
    "winogrande": [
        {
            "sentence": f"{words(4)} _ {words(3)}",
            "option1": words(1),
            "option2": words(1),
            "answer": str(1 + LABELS[i]),
        }
        for i in range(ROWS)
    ],
    "arc_easy": [{"question": words(6), "choices": choices(), "answerKey": "ABCD"[i % 4]} for i in range(ROWS)],
    "arc_challenge": [{"question": words(6), "choices": choices(), "answerKey": "ABCD"[i % 4]} for i in range(ROWS)],
    "openbookqa": [{"question_stem": words(6), "choices": choices(), "answerKey": "ABCD"[i % 4]} for i in range(ROWS)],
}


def write(folder, name, rows, suffix=".jsonl"):
    """A task's file; gives its path."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = folder / (SOURCES[name].stem + suffix)
    path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    return path


def run(model, names, folder, limit=None, reporter=None):
    return evaluate_tasks(
        model, tuple(names), folder=folder, max_documents=limit, dtype=torch.float32, reporter=reporter or Silent()
    )
