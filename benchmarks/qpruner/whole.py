"""Whole recipes: which ones there are, how they are opened, and where their directories are."""

import gzip
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results
from trimbit.evaluate.tasks import SOURCES
from trimbit.jobs.progress import Reporter
from trimbit.pipeline.flow import compress
from trimbit.pipeline.job import Job

RECIPES = ("llm-pruner", "qpruner-3", "qpruner-1", "qpruner-2")  # in the order in which they are run
RATIOS = (20, 50, 30)  # percent, in the order in which they are run
VARIANTS = {  # recipe and overrides, run at the first ratio; a faithful trial takes a minute per 100 documents
    "faithful": ("qpruner-3-faithful", ("search.objective.documents=100",)),
}
DOCUMENTS = 500  # of each task, on which results are reported
INSTRUCTIONS = "instruct/alpaca_2000.jsonl.gz"


class Whole(NamedTuple):
    """A recipe at a pruning ratio in percent; None: it prunes nothing."""

    recipe: str
    ratio: int | None

    @property
    def key(self) -> str:
        """Its name in keys of cells and rows of tables."""
        return self.recipe if self.ratio is None else f"{self.recipe}/{self.ratio} %"


def all_recipes() -> list[Whole]:
    """All recipes that are run, in this order."""
    first, *rest = [Whole(recipe, ratio) for ratio in RATIOS for recipe in RECIPES]
    return [first, *rest[:3], Whole("loftq-only", None), *rest[3:], *(Whole(one, RATIOS[0]) for one in VARIANTS)]


def recipe_of(own: Whole) -> tuple[str, tuple[str, ...]]:
    """The name of the recipe file, and the overrides, except those that name data."""
    based, changes = VARIANTS.get(own.recipe, (own.recipe, ()))
    return based, (*(() if own.ratio is None else (f"prune.ratio={own.ratio / 100}",)), *changes)


def recovering(bench: Bench, own: Whole, seed: int, reporter: Reporter | None = None) -> Job:
    """The job of a recipe, with this benchmark's data for recovery and search."""
    based, overrides = recipe_of(own)
    overrides += (f"tune.data={bench.data / INSTRUCTIONS}",)
    if own.recipe == "faithful":
        overrides += (f"search.objective.data={_other_documents(bench)}",)
    return bench.job(based, seed, overrides, reporter=reporter)


def _other_documents(bench: Bench) -> Path:
    """A folder with HellaSwag without the documents on which results are reported, for a search to choose by."""
    folder, name = bench.work / "tasks-to-search-by", f"{SOURCES['hellaswag'].stem}.jsonl"
    with gzip.open(bench.data / "tasks" / f"{name}.gz", "rt", encoding="utf-8") as rows:
        left = list(rows)[DOCUMENTS:]
    assert len(left) >= 100, "the search by accuracy asks for 100 documents"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(left), encoding="utf-8")
    return folder


def make(bench: Bench, own: Whole, seed: int, reporter: Reporter | None = None) -> tuple[Path, Job]:
    """Make the directory of a recipe again; finished stages come from the cache."""
    out, job = _folder(bench, own, seed), recovering(bench, own, seed, reporter)
    shutil.rmtree(out, ignore_errors=True)
    compress(job, None, out)
    return out, job


def made(bench: Bench, own: Whole, seed: int) -> Path:
    """The directory of a recipe, made if it does not exist."""
    out = _folder(bench, own, seed)
    return out if out.exists() else make(bench, own, seed)[0]


def _folder(bench: Bench, own: Whole, seed: int) -> Path:
    return bench.work / "recipes" / seeded(f"{own.recipe}-{own.ratio or 0}", seed).replace("/", "-")


def each(
    bench: Bench,
    part: str,
    seed: int,
    minutes: float,
    run: Callable[[Bench, Whole, int], Found],
    *,
    context: int | None = None,
    texts: tuple[Path, ...] = (),
) -> Iterator[Cell]:
    """A cell for each recipe."""
    for own in all_recipes():
        yield Cell(
            key=seeded(f"{part}/{own.key}", seed), run=partial(run, bench, own, seed), minutes=minutes,
            seed=seed, context=context, texts=texts,
        )  # fmt: skip


def by_ratio() -> list[Whole]:
    """All recipes in the order of table rows."""
    return sorted(all_recipes(), key=lambda own: (own.ratio or 0, own.recipe))


def rows_of(results: Results, part: str, width: int, cells: Callable[[Found], list[str]]) -> list[list[str]]:
    """A row of `width` figures for each recipe."""
    found = [(own.key, results.get(f"{part}/{own.key}")) for own in by_ratio()]
    return [[key, *(cells(cell) if cell else ["not run", *[""] * (width - 1)])] for key, cell in found]
