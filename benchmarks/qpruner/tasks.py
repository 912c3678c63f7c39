"""How much zero-shot accuracy is left?

Cells: the original and each recipe on the first 500 documents of each of seven tasks. About 12 minutes per cell once
`qpruner.recipes` has made the directories. Alone: `python benchmarks/run.py qpruner.tasks --data DATA`
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results, table
from qpruner.statistics import paired
from qpruner.whole import DOCUMENTS, Whole, each, made, rows_of
from trimbit.evaluate.lm_eval import evaluate_tasks
from trimbit.evaluate.tasks import SOURCES
from trimbit.jobs.progress import Silent

SEEDS = (0,)
SHARED_MINUTES = 0.0
MINUTES = 12


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for the original, then one for each recipe."""
    texts = tuple(bench.data / "tasks" / f"{source.stem}.jsonl.gz" for source in SOURCES.values())
    yield Cell(
        key=seeded("tasks/original", seed), run=partial(of_original, bench, seed), minutes=MINUTES,
        seed=seed, texts=texts,
    )  # fmt: skip
    yield from each(bench, "tasks", seed, MINUTES, of_recipe, texts=texts)


def of_original(bench: Bench, seed: int) -> Found:
    """Scores of the original model."""
    return scores(bench, bench.original(seed))


def of_recipe(bench: Bench, own: Whole, seed: int) -> Found:
    """Scores of the model that a recipe makes."""
    return scores(bench, made(bench, own, seed))


def scores(bench: Bench, path: Path) -> Found:
    """The headline score of each task in percent, its standard error, and which documents were answered correctly."""
    found = evaluate_tasks(
        path,
        tuple(SOURCES),
        folder=bench.data / "tasks",
        max_documents=DOCUMENTS,
        dtype=torch.bfloat16,
        reporter=Silent(),
    )
    mean = found.task_mean
    return {
        "tasks": {name: (100 * task.score.value, 100 * (task.score.stderr or 0)) for name, task in found.tasks.items()},
        "mean": (100 * mean.value, 100 * (mean.stderr or 0)),
        "correct": {name: task.correct for name, task in found.tasks.items()},
    }


def rows(results: Results) -> list[str]:
    """A table of each task, the means, and the paired difference from `llm-pruner`."""

    def figures(c: Found) -> list[str]:
        (value, error), others = c["mean"], [c["tasks"][name][0] for name in SOURCES if name != "boolq"]
        every = [f"{c['tasks'][name][0]:.1f}" for name in SOURCES]
        return [*every, f"{value:.1f} ± {error:.1f}", f"{sum(others) / len(others):.1f}"]

    found = rows_of(results, "tasks", len(SOURCES) + 2, figures)
    for row in found:
        row += _above(results, row[0])
    if "tasks/original" in results:
        found.insert(0, ["original", *figures(results["tasks/original"]), "", ""])
    heads = ["mean", "without BoolQ", "mean, above llm-pruner", "without BoolQ"]
    return table(["recipe, pruned", *SOURCES, *heads], found)


def _above(results: Results, key: str) -> list[str]:
    """The mean difference from `llm-pruner` at the same ratio, with and without BoolQ."""
    recipe, _, ratio = key.partition("/")
    base, own = results.get(f"tasks/llm-pruner/{ratio}"), results.get(f"tasks/{key}")
    if recipe == "llm-pruner" or base is None or own is None:
        return ["", ""]
    if "correct" not in base or "correct" not in own:
        return ["answers not kept"] * 2
    found = []
    for left_out in ((), ("boolq",)):
        asked = [name for name in SOURCES if name not in left_out]
        gain = paired(*({name: c["correct"][name] for name in asked} for c in (own, base)))
        found.append("{:+.1f} ± {:.1f}".format(*gain))
    return found
