"""How much have the gradients of two rows in common?

Cells: three settings, one of them also channel by channel. For each pair of eight rows and each loss, they hold the
cosine between a first step's gradients of all logits, and between the signs of these. Each row has its own sample of
the masks. 3 to 20 minutes per cell.
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
ROWS = 8  # of text; the gradient of one piece of each is compared
CASES: dict[str, tuple[str, ...]] = dict.fromkeys(WITH_ALL, ()) | {
    "W3.2A3.2, channel by channel": ("search.whole_tiles=false",)
}


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each case."""
    for name in CASES:
        yield Cell(
            key=seeded(f"agreement/{name}", seed), run=partial(cosines, bench, name, seed), minutes=5,
            seed=seed, texts=files(bench, ()),
        )  # fmt: skip


def overrides(name: str, loss: str) -> tuple[str, ...]:
    """Overrides of the recipe."""
    return (*CASES[name], "search.network=logits", f"search.loss={loss}", f"calibration.training={ROWS}")


def cosines(bench: Bench, name: str, seed: int) -> Found:
    """Cosines between the gradients, and between their signs, of each pair of rows, by loss."""
    found: dict[str, dict[str, list[float]]] = {}
    pairs = torch.triu_indices(ROWS, ROWS, 1)
    for loss in LOSSES:
        gradients = _gradients(opened(bench, SETTINGS[name.split(",")[0]][1], overrides(name, loss), seed))
        for kind, each in (("gradients", gradients), ("signs", gradients.sign())):
            # without their means: the budget undoes whatever moves all logits alike
            flat = functional.normalize(each - each.mean(1, keepdim=True), dim=1)
            found.setdefault(kind, {})[loss] = [round(float(cosine), 4) for cosine in (flat @ flat.T)[*pairs]]
    return found


def _gradients(job: Job) -> Tensor:
    """The gradients [rows, logits] of a first step on each row."""
    with ready(job) as own:
        training = Training(own.problem, job.steps.search, own.sites)
        pieces = job.recipe.calibration.length // job.steps.search.length  # per row; only the first is used
        found = []
        for row in range(ROWS):
            training.network.zero_grad()
            training.backward(row * pieces)
            found.append(torch.cat([p.grad.flatten() for p in training.network.parameters() if p.grad is not None]))
    return torch.stack(found)


def rows(results: Results) -> list[str]:
    """A table of the mean and the range of the cosines over pairs of rows."""
    found = []
    for name in CASES:
        if cell := results.get(f"agreement/{name}"):
            own = (cell[kind][loss] for kind in ("gradients", "signs") for loss in LOSSES)
            found.append([name, *map(draws, own)])
    heads = ["setting", *(f"{kind}, {loss}" for kind in ("gradients", "signs") for loss in ("next token", "KL"))]
    return table(heads, found or [["not run", *[""] * (len(heads) - 1)]])
