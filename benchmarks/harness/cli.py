"""The command line: chooses experiments and their cells, runs them, and writes the pages."""

import argparse
import importlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, cast

from harness.bench import BENCHMARKS, WORK, Bench
from harness.cells import Cell, Results
from harness.tables import Results as Stored

GROUPS = ("main", "qpruner", "toga")  # folders; each has EXPERIMENTS, ALONE, and `page.py` with `write(results)`
MODEL = Path(".models/SmolLM2-135M-Instruct.Q4_1.gguf")


class Experiment(Protocol):
    """What the module of an experiment provides."""

    SEEDS: tuple[int, ...]  # run unless others are named
    SHARED_MINUTES: float  # for the cached stages that its cells share, expected on two cores with AVX2

    def cells(self, bench: Bench, seed: int) -> Iterable[Cell]:
        """The cells for a seed, in the order in which they are run."""


def parse(doc: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `doc` is its description."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", help="GROUP or GROUP.EXPERIMENT")
    parser.add_argument("--data", type=Path, help="folder with wikitext-2, text, tasks and instruct")
    parser.add_argument("--model", type=Path, default=MODEL, help="a model directory or a .gguf file")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells whose key matches, as in a shell")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of each experiment")
    parser.add_argument("--stale", action="store_true", help="also run cells again that other code has measured")
    parser.add_argument("--list", action="store_true", help="show the cells and run nothing")
    parser.add_argument("--pages", action="store_true", help="write the pages and run nothing")
    options = parser.parse_args(arguments)
    if options.data is None and not (options.list or options.pages):
        parser.error("cells are run on --data")
    options.experiments = [own for name in options.experiments for own in _experiments(parser, name)]
    return options


def _experiments(parser: argparse.ArgumentParser, name: str) -> list[str]:
    """The names of all experiments of a group, or of the one that is named."""
    group, _, own = name.partition(".")
    if group in GROUPS:
        module = importlib.import_module(group)
        if not own:
            return [f"{group}.{one}" for one in module.EXPERIMENTS]
        if own in (*module.EXPERIMENTS, *module.ALONE):
            return [name]
    known = [f"{one}.{own}" for one in GROUPS for own in _all(one)]
    return parser.error(f"no experiment {name!r}; known are {', '.join((*GROUPS, *known))}")


def _all(group: str) -> tuple[str, ...]:
    module = importlib.import_module(group)
    return (*module.EXPERIMENTS, *module.ALONE)


def experiment(name: str) -> Experiment:
    """The module of an experiment."""
    return cast("Experiment", importlib.import_module(name))


def chosen(name: str, bench: Bench, options: argparse.Namespace) -> Iterator[Cell]:
    """The cells of an experiment that the options select."""
    module = experiment(name)
    for seed in options.seeds or module.SEEDS:
        yield from (cell for cell in module.cells(bench, seed) if fnmatchcase(cell.key, options.only))


def results_of(name: str) -> Results:
    """The results file of an experiment's group; `name` may also be that of a group."""
    return Results(BENCHMARKS / "results" / f"{name.partition('.')[0]}.json")


def show(names: Iterable[str], bench: Bench, options: argparse.Namespace) -> None:
    """Print the cells, which of them are missing, and how long those will take."""
    total = 0.0
    for name in names:
        shared, results = experiment(name).SHARED_MINUTES, results_of(name)
        cells = list(chosen(name, bench, options))
        missing = [cell for cell in cells if results.missing(cell, stale=options.stale)]
        for cell in cells:
            state = f"{cell.minutes:4.0f} min" if cell in missing else "    done"
            print(f"{state}  {name}  {cell.key}")
        if missing:
            minutes = shared + sum(cell.minutes for cell in missing)
            total += minutes
            print(f"{minutes:4.0f} min  {name}: {len(missing)} cells, {shared:.0f} min of it for what they share")
    print(f"about {total / 60:.1f} hours on two cores with AVX2")


def main(doc: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run cells, list them, or only write the pages, as the options say."""
    options = parse(doc, arguments)
    bench = Bench(source=options.model, data=options.data or Path())
    if options.list:
        show(options.experiments, bench, options)
        return
    if not options.pages:
        os.environ.setdefault("TRIMBIT_CACHE", str(WORK / "cache"))  # also for processes that cells start
        for name in options.experiments:
            results = results_of(name)
            for cell in chosen(name, bench, options):
                if results.missing(cell, stale=options.stale):
                    print(f"{name}: {cell.key}, about {cell.minutes:.0f} minutes", flush=True)
                    print(json.dumps(results.run(cell)), flush=True)
    for group in dict.fromkeys(name.partition(".")[0] for name in options.experiments):
        write_page(group, results_of(group).read())


def write_page(group: str, stored: Stored) -> None:
    """Write the tables and pictures of a group's page."""
    importlib.import_module(f"{group}.page").write(stored)
