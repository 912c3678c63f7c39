"""How close is the noise that a search sees to errors that all tokens share?

Cells: three settings, each with three kinds of masks; the KL with errors drawn for each token, and with errors drawn
once in the weights. 5 to 10 minutes per cell once `toga.settings` has learnt the masks.
Alone: `python benchmarks/run.py toga.noise --data DATA`
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from statistics import mean

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from harness.records import held_out_kl
from harness.tables import Results, table
from toga.compressed import files, opened
from toga.masks import KINDS, drawn_errors, masks_of, ready, shared_kl
from toga.methods import SETTINGS, WITH_ALL

SEEDS = (0,)
SHARED_MINUTES = 10.0


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each kind of masks at each setting."""
    for setting, kind in product(WITH_ALL, KINDS):
        yield Cell(
            key=seeded(f"noise/{setting}/{kind}", seed),
            run=partial(drawn, bench, setting, kind, seed),
            minutes=8, seed=seed, texts=files(bench, ()),
        )  # fmt: skip


def drawn(bench: Bench, setting: str, kind: str, seed: int) -> Found:
    """KL with both kinds of errors, on the rows by which plans are chosen."""
    with ready(opened(bench, SETTINGS[setting][1], seed=seed)) as own:
        _, masks, found = masks_of(own, kind)
        masked = own.masked
        shared = shared_kl(masked, masks, lambda draw: drawn_errors(masked, masks, draw))
        return found | {"own": masked.damage(masks).kl, "shared": shared}


def rows(results: Results) -> list[str]:
    """A table of KL by the errors of the weights: expected, GPTQ's, or as packed."""
    found = []
    for setting, kind in product(WITH_ALL, KINDS):
        drawn, made, packed = (results.get(f"{part}/{setting}/{kind}") for part in ("noise", "gptq", "settings"))
        figures = [f"{drawn['own']:.3f}", draws(drawn["shared"])] if drawn else ["not run", ""]
        figures += [draws(made["signs"]), f"{made['kl']:.3f}"] if made else ["", ""]
        found.append([setting, kind, *figures, f"{held_out_kl(packed):.3f}" if packed else ""])
    heads = ("of each token's own", "shared by all tokens", "GPTQ's, signs at random", "GPTQ's, dense inputs", "packed")
    return table(["setting", "masks", *heads], found)


def draws(found: list[float]) -> str:
    """Mean and range, as text."""
    return f"{mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"
