"""What does a step of learning masks cost, in time and memory, for each error model?

One cell at W3.2A3.2: the time of whole steps of 512 tokens in each mode, in turns, the peak bytes of each mode above
those of the imports, and the operators in which a step spends its time. About 30 minutes.
Alone: `python benchmarks/run.py toga.cost --data DATA`
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from harness.process import measured
from harness.tables import Results, table
from toga.compressed import files, opened
from toga.masks import ready
from trimbit.jobs.progress import Progress, Silent
from trimbit.pipeline.job import Job
from trimbit.search.methods.toga import learn

SEEDS = (0,)
SHARED_MINUTES = 10.0
RECIPE = "toga-q-w3.2a3.2"
MODES: dict[str, tuple[str, ...]] = {
    "expected errors, blocks run twice": ("search.checkpointing=true",),
    "expected errors": ("search.checkpointing=false",),
    "two roundings, packed, blocks run twice": (
        "search.error_model=rtn", "search.dense=false", "search.checkpointing=true",
    ),
    "two roundings, dense": ("search.error_model=rtn", "search.dense=true", "search.checkpointing=false"),
}  # fmt: skip
FASTEST = "expected errors"
OPERATORS = 10  # named on the page
STEPS, ROUNDS = 4, 2  # of each mode


def overrides(mode: str, steps: int) -> tuple[str, ...]:
    """Overrides of the recipe, with no more text than the steps need."""
    return (*MODES[mode], f"search.steps={steps}", "calibration.training=2")


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """The one cell."""
    yield Cell(
        key=seeded("cost", seed), run=partial(cost, bench, seed), minutes=30, seed=seed, texts=files(bench, ())
    )  # fmt: skip


def in_mode(bench: Bench, mode: str, seed: int, steps: int = STEPS) -> Job:
    """A job that learns masks in a mode."""
    return opened(bench, RECIPE, overrides(mode, steps), seed)


def cost(bench: Bench, seed: int) -> Found:
    """Seconds of each step and peak bytes by mode, and each operator's share of a step's time."""
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for mode in [*MODES] * ROUNDS:
        seconds[mode] += step_seconds(in_mode(bench, mode, seed))
    child, given = ["-m", "toga.cost"], [str(seed), bench.dump()]
    _, imports = measured(child)
    peaks = {mode: measured([*child, mode, *given])[1] - imports for mode in MODES}
    return {"step_seconds": seconds, "peaks": peaks, "operators": operators(in_mode(bench, FASTEST, seed))}


class Ends(Silent):
    """A reporter that notes when each step of learning masks ends."""

    def __init__(self) -> None:
        self.at: list[float] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Note the steps of the stage `masks`; ignore other stages."""
        yield lambda *_: self.ended() if name == "masks" else None

    def ended(self) -> None:
        """Note that a step has ended."""
        self.at.append(time.perf_counter())


class Profiled(Ends):
    """A reporter that profiles the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def ended(self) -> None:
        """Start after the first step, stop after the second."""
        super().ended()
        if len(self.at) <= 2:
            (self.profile.start if len(self.at) == 1 else self.profile.stop)()


def operators(job: Job) -> dict[str, float]:
    """The share of a training's second step spent in each operator itself, the largest first."""
    ends = Profiled()
    _train(job, ends)
    own = {event.key: event.self_cpu_time_total for event in ends.profile.key_averages()}
    whole = sum(own.values())
    return {key: round(own[key] / whole, 4) for key in sorted(own, key=own.__getitem__, reverse=True)[:OPERATORS]}


def step_seconds(job: Job) -> list[float]:
    """Seconds of each step, except the first, of a training from the start."""
    ends = Ends()
    _train(job, ends)
    return [round(b - a, 3) for a, b in pairwise(ends.at)]


def _train(job: Job, ends: Ends) -> None:
    """Train in an empty folder, because a training that is finished has no steps left."""
    with ready(job) as own, tempfile.TemporaryDirectory() as folder:
        problem = replace(own.problem, state=Path(folder), reporter=ends)
        learn(problem, job.steps.search, own.sites)


def rows(results: Results) -> list[str]:
    """A table of seconds, ratios and peaks by mode, and one of operators."""
    cell = results.get("cost")
    if cell is None:
        return ["not run"]
    each = {kind: sorted(own) for kind, own in cell["step_seconds"].items()}
    base = median(next(iter(each.values())))
    found = [
        [kind, f"{median(own):.2f}", f"{own[0]:.2f} to {own[-1]:.2f}", f"{median(own) / base:.2f}",
         f"{cell['peaks'][kind] / 1e6:.0f}"]
        for kind, own in each.items()
    ]  # fmt: skip
    lines = table(["while masks are learnt", "seconds a step, median", "range", "ratio", "peak, MB"], found)
    shares = sorted(cell["operators"].items(), key=lambda own: -own[1])
    parts = [[f"`{name}`", f"{100 * share:.1f}"] for name, share in shares]
    return [*lines, "", *table([f"operator, while masks are learnt: {FASTEST}", "% of a step"], parts)]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        mode, seed, bench = sys.argv[1:]
        step_seconds(in_mode(Bench.load(bench), mode, int(seed), 2))
