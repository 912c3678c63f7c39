"""How close are the errors of GPTQ to the expected ones, and do their signs matter?

Cells: three settings, each with the masks of diag H and with learnt ones; the KL with GPTQ's errors on the dense
inputs, and with a random sign for each row of them. 5 to 10 minutes per cell once `toga.settings` has learnt the masks.
Alone: `python benchmarks/run.py toga.gptq --data DATA`
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from toga.compressed import files, opened
from toga.masks import Errors, gptq_errors, masks_of, ready, shared_kl, with_errors
from toga.methods import SETTINGS, WITH_ALL

SEEDS = (0,)
SHARED_MINUTES = 10.0


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each kind of masks at each setting."""
    for setting, kind in product(WITH_ALL, ("diag H", "learnt")):
        yield Cell(
            key=seeded(f"gptq/{setting}/{kind}", seed),
            run=partial(made, bench, setting, kind, seed),
            minutes=8, seed=seed, texts=files(bench, ()),
        )  # fmt: skip


def made(bench: Bench, setting: str, kind: str, seed: int) -> Found:
    """KL on the rows by which plans are chosen."""
    with ready(opened(bench, SETTINGS[setting][1], seed=seed)) as own:
        plan, masks, _ = masks_of(own, kind)
        found = gptq_errors(own, plan)
        with with_errors(own.masked, lambda site, at: found[site, at]):
            kl = own.masked.damage(masks).kl
        return {"kl": kl, "signs": shared_kl(own.masked, masks, lambda draw: _signs(found, draw))}


def _signs(found: dict[tuple[str, int], Tensor], seed: int) -> Errors:
    """The errors, with a random sign for each row."""
    generator = torch.Generator().manual_seed(seed)

    def errors(site: str, at: int) -> Tensor:
        own = found[site, at]
        return own * (1 - 2 * torch.randint(0, 2, (len(own), 1), generator=generator))

    return errors
