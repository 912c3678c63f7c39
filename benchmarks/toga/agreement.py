"""How much have the gradients of two rows in common?

Cells: three settings, one also channel by channel; cosines of a first step's gradients for all logits, and of their
signs, of each two of eight rows, by loss. Each row has its own sample of the masks. 3 to 20 minutes a cell.
Alone: `python benchmarks/run.py toga.agreement --data DATA`
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results, table
from toga.compressed import files, opened
from toga.masks import ready
from toga.methods import SETTINGS, WITH_ALL
from toga.noise import draws
from trimbit.pipeline.job import Job
from trimbit.search.two_formats.training import Training

SEEDS = (0,)
SHARED_MINUTES = 10.0
LOSSES = ("lm", "kl")
ROWS = 8  # of the text, of each of which the gradient of one piece is compared
CASES: dict[str, tuple[str, ...]] = dict.fromkeys(WITH_ALL, ()) | {
    "W3.2A3.2, channel by channel": ("search.whole_tiles=false",)
}


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """Each case."""
    for name in CASES:
        yield Cell(
            key=seeded(f"agreement/{name}", seed), run=partial(cosines, bench, name, seed), minutes=5,
            seed=seed, texts=files(bench, ()),
        )  # fmt: skip


def overrides(name: str, loss: str) -> tuple[str, ...]:
    """Of the recipe."""
    return (*CASES[name], "search.network=logits", f"search.loss={loss}", f"calibration.training={ROWS}")


def cosines(bench: Bench, name: str, seed: int) -> Found:
    """Of gradients and of signs, by loss, of each two rows."""
    found: dict[str, dict[str, list[float]]] = {}
    pairs = torch.triu_indices(ROWS, ROWS, 1)
    for loss in LOSSES:
        gradients = _gradients(opened(bench, SETTINGS[name.split(",")[0]][1], overrides(name, loss), seed))
        for kind, each in (("gradients", gradients), ("signs", gradients.sign())):
            # the gradients' means are 0: what moves all logits alike is taken back by the budget
            flat = functional.normalize(each - each.mean(1, keepdim=True), dim=1)
            found.setdefault(kind, {})[loss] = [round(float(cosine), 4) for cosine in (flat @ flat.T)[*pairs]]
    return found


def _gradients(job: Job) -> Tensor:
    """Of a first step on each row, [rows, logits]."""
    with ready(job) as own:
        training = Training(own.problem, job.steps.search, own.sites)
        pieces = job.recipe.calibration.length // job.steps.search.length  # of a row: the others would be neighbours
        found = []
        for row in range(ROWS):
            training.network.zero_grad()
            training.backward(row * pieces)
            found.append(torch.cat([p.grad.flatten() for p in training.network.parameters() if p.grad is not None]))
    return torch.stack(found)


def rows(results: Results) -> list[str]:
    """Means over pairs of rows, and the range."""
    found = []
    for name in CASES:
        if cell := results.get(f"agreement/{name}"):
            own = (cell[kind][loss] for kind in ("gradients", "signs") for loss in LOSSES)
            found.append([name, *map(draws, own)])
    heads = ["setting", *(f"{kind}, {loss}" for kind in ("gradients", "signs") for loss in ("next token", "KL"))]
    return table(heads, found or [["not run", *[""] * (len(heads) - 1)]])
