"""Are GPTQ's errors as large as expected, at every kind of site?

Cells: three settings. For one weight per site they hold E |(W - Q) x|^2 with GPTQ and with rounding to nearest, each
divided by the expected value. The high channels are those of the largest diag H; x is the input in the dense model.
About 3 minutes per cell.
Alone: `python benchmarks/run.py toga.errors --data DATA`
"""

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results, table
from toga.compressed import files, opened
from toga.masks import Masks, Opened, diag_h, expected_errors, layer_of, ready, residuals
from toga.methods import SETTINGS, WITH_ALL
from trimbit.schema.plan import Plan
from trimbit.transform.quant import gptq, rtn

SEEDS = (0,)
SHARED_MINUTES = 10.0


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each setting."""
    for setting in WITH_ALL:
        yield Cell(
            key=seeded(f"errors/{setting}", seed), run=partial(ratios, bench, setting, seed), minutes=3, seed=seed,
            texts=files(bench, ()),
        )  # fmt: skip


def ratios(bench: Bench, setting: str, seed: int) -> Found:
    """The ratio for each block, by kind of site and by quantiser."""
    found: dict[str, dict[str, list[float]]] = {}
    with ready(opened(bench, SETTINGS[setting][1], seed=seed)) as own:
        plan, masks = diag_h(own)
        for site in masks:
            kinds = found.setdefault(site.split(".", 2)[2], {})
            for kind, ratio in _site(own, plan, masks, site).items():
                kinds.setdefault(kind, []).append(round(ratio, 4))
    return {"ratios": found}


def _site(own: Opened, plan: Plan, masks: Masks, site: str) -> dict[str, float]:
    """The ratio by quantiser for the first weight of a site."""
    assert own.prepared.stats is not None
    name, layer = own.job.layout.readers(site)[0].name, layer_of(own.masked, site)
    moments = own.prepared.stats.moments(site)
    w = own.job.stream.checkpoint.tensor(f"{name}.weight").float()
    along, rest = expected_errors(layer, masks[site] > 0)
    r = residuals(layer).double()
    expected = ((along.square() + rest).double() @ ((r @ moments.h.double()) * r).sum(1)).sum()
    order, runs = torch.tensor(plan.orders[site]), plan.weights[name]
    moments, w = moments.at(order), w[:, order]
    made = {
        "GPTQ": gptq.quantize(w, moments, runs, gptq.Config()),
        "rounded to nearest": rtn.quantize(w, None, runs, rtn.Config(scales="mse")),
    }
    found = {}
    for kind, q in made.items():
        errors = (w - q.dequantize()).double()
        found[kind] = float(((errors @ moments.h.double()) * errors).sum() / expected)
    return found


def rows(results: Results) -> list[str]:
    """A table of the median and the range of the ratios over blocks."""
    found = []
    for setting in WITH_ALL:
        cell = results.get(f"errors/{setting}", {"ratios": {"not run": {}}})
        for site, kinds in cell["ratios"].items():
            each = (f"{median(own):.2f} ({min(own):.2f} to {max(own):.2f})" for own in kinds.values())
            found.append([setting, site, *(each if kinds else ("", ""))])
    return table(["setting", "site", "GPTQ / expected", "rounded to nearest / expected"], found)
