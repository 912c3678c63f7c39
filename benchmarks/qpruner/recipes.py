"""How good are whole recipes on text, and what do they cost: llm-pruner, QPruner-1, -2, -3, at 20, 30 and 50 %?

Cells: the original, and each recipe from pruning to recovery. 30 to 60 minutes per cell. The directories stay in
`benchmarks/.work/recipes`, where `memory` and `tasks` find them.
Alone: `python benchmarks/run.py qpruner.recipes --data DATA --only '*/20 %'`
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from safetensors import safe_open

from harness.bench import TEST, TRAIN, Bench
from harness.cells import Cell, Found, seeded
from harness.process import Timed
from harness.quality import perplexity, quality
from harness.records import run_fields
from harness.tables import Results, table
from qpruner.whole import INSTRUCTIONS, Whole, each, make, rows_of
from trimbit.artifact.files import PLAN_FILE, weight_nbytes
from trimbit.model.layout import Layout
from trimbit.model.resolved import resolve
from trimbit.schema.plan import Plan, load_plan

SEEDS = (0,)
SHARED_MINUTES = 20.0  # for moments, rankings, importance, and the original's outputs on the instructions
SHORT = 128  # tokens, the second context for perplexity
INSIDE = {"search", "the model's own output", "the original's outputs"}  # nested stages, which would count twice
SHARED = {"the original's answers", "ranking of channels and heads", "importance of each layer"}


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for the original, then one for each recipe."""
    texts = (bench.data / TEST, bench.data / TRAIN, bench.data / INSTRUCTIONS)
    yield Cell(
        key=seeded("whole/original", seed), run=partial(original, bench, seed), minutes=4, seed=seed,
        context=bench.context, texts=texts[:1],
    )  # fmt: skip
    yield from each(bench, "whole", seed, 45, whole, context=bench.context, texts=texts)


def original(bench: Bench, seed: int) -> Found:
    """Bytes and quality of the original model."""
    path = bench.original(seed)
    short = perplexity(bench, path, TEST, SHORT)
    return {"nbytes": weight_nbytes(path)} | quality(bench, path, path) | {f"ppl@{SHORT}": short}


def whole(bench: Bench, own: Whole, seed: int) -> Found:
    """Bytes, quality and cost of a recipe; its directory is kept for other cells."""
    timed = Timed()
    out, job = make(bench, own, seed, timed)
    tuning, plan = json.loads((out / "tuning.json").read_text(encoding="utf-8")), load_plan(out / PLAN_FILE)
    losses, record = tuning["losses"], run_fields(out)
    return record | {
        "adapter_nbytes": _pairs_nbytes(out), "trained_nbytes": tuning["trained_nbytes"],
        "optimizer_nbytes": tuning["optimizer_nbytes"], "first_losses": sum(losses[:10]) / 10,
        "last_losses": sum(losses[-10:]) / 10, "stage_seconds": timed.seconds, "steps": len(losses),
        "trials": len(record["tried"]), "block_weights_by_format": _weights_by_format(job.layout, plan),
    } | quality(bench, out, bench.original(seed)) | {f"ppl@{SHORT}": perplexity(bench, out, TEST, SHORT)}  # fmt: skip


def _pairs_nbytes(out: Path) -> int:
    """Bytes of the low-rank pairs, in bf16."""
    with safe_open(out / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".adapter." in name]  # noqa: SIM118
        return sum(2 * math.prod(file.get_slice(name).get_shape()) for name in names)


def _weights_by_format(layout: Layout, plan: Plan) -> dict[str, int]:
    """The number of block weights in each format; each weight matrix has one run."""
    found: Counter[str] = Counter()
    for unit in resolve(plan, layout).units.values():
        for weight in unit.weights.values() if unit.origin.block is not None else ():
            found[weight.runs[0].precision.name] += weight.shape[0] * weight.shape[1]
    return dict(found)


def rows(results: Results) -> list[str]:
    """A table of bytes and quality by recipe."""

    def figures(c: Found) -> list[str]:
        return [
            f"{c['nbytes'] / 1e6:.1f}", f"{c['ppl@2048']:.2f}", f"{c['ppl@128']:.2f}", f"{c['kl']:.3f}",
            f"{100 * c['top1']:.1f} %",
        ]  # fmt: skip

    found = rows_of(results, "whole", 5, figures)
    if "whole/original" in results:
        found.insert(0, ["original", *figures(results["whole/original"])])
    return table(["recipe, pruned", "weight file, MB", "ppl@2048", "ppl@128", "KL", "same first choice"], found)


def cost_rows(results: Results) -> list[str]:
    """A table of the minutes of each recipe's own stages, seconds per step and per trial, and losses."""

    def figures(c: Found) -> list[str]:
        seconds = c["stage_seconds"]
        trials = seconds.get("trials of whole plans")
        return [
            f"{sum(s for stage, s in seconds.items() if stage not in INSIDE | SHARED) / 60:.1f}",
            f"{seconds['recovery'] / c['steps']:.1f}",
            f"{trials / c['trials']:.1f}" if trials else "",
            f"{c['first_losses']:.3f}, {c['last_losses']:.3f}",
        ]

    heads = ["minutes in all", "seconds a step", "seconds a trial", "loss of the first, last 10 steps"]
    return table(["recipe, pruned", *heads], rows_of(results, "whole", 4, figures))
