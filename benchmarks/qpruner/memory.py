"""How much memory do recovery, with and without checkpointing, and inference take?

Cells: for each recipe, the peak resident bytes, above those of the imports, of two steps of recovery and of one window
of 2,048 tokens, each in its own process. About 3 minutes per cell once `qpruner.recipes` has made the directories.
Alone: `python benchmarks/run.py qpruner.memory --data DATA`
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from harness.bench import Bench
from harness.cells import Cell, Found
from harness.process import measured
from harness.tables import Results, table
from qpruner.whole import INSTRUCTIONS, Whole, by_ratio, each, made, recovering
from trimbit.evaluate.perplexity import final_hidden
from trimbit.pipeline.recovering import config_of, examples_of, teacher_of
from trimbit.recover.recovery import train_pairs
from trimbit.runtime.load import load_model

SEEDS = (0,)
SHARED_MINUTES = 0.0
KINDS = ("training", "checkpointed", "inference")
STEPS = 2


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each recipe."""
    yield from each(bench, "memory", seed, 3, peaks, texts=(bench.data / INSTRUCTIONS,))


def peaks(bench: Bench, own: Whole, seed: int) -> Found:
    """Peak resident bytes by kind above those of the imports, and those of the imports."""
    out, job = made(bench, own, seed), recovering(bench, own, seed)
    teacher_of(job, examples_of(job, None), config_of(job, STEPS))  # first, as its memory is no part of a step
    child = ["-m", "qpruner.memory"]
    _, imports = measured([*child, "imports", str(out)])
    given = [own.recipe, str(own.ratio or 0), str(seed), bench.dump()]
    return {kind: measured([*child, kind, str(out), *given])[1] - imports for kind in KINDS} | {"imports": imports}


def measure(kind: str, out: Path, recipe: str = "", ratio: str = "0", seed: str = "0", bench: str = "") -> None:
    """Run one kind of work; called in its own process, whose memory is measured."""
    import peft  # noqa: F401

    if kind in {"training", "checkpointed"}:
        job = recovering(Bench.load(bench), Whole(recipe, int(ratio) or None), int(seed))
        config = config_of(job, STEPS).model_copy(update={"checkpointing": kind == "checkpointed"})
        examples = examples_of(job, None)
        taught = teacher_of(job, examples, config)
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state.safetensors"
            train_pairs(out, config, examples, taught, state, job.seed, lambda _done, _total: None)
    elif kind == "inference":
        final_hidden(load_model(out, torch.bfloat16), torch.arange(2048))


def rows(results: Results) -> list[str]:
    """A table of what fine-tuning holds: stored weights without the pairs, pairs in fp32, moments of AdamW."""

    def parts(c: Found) -> tuple[int, int, int]:
        return c["nbytes"] - c["adapter_nbytes"], c["trained_nbytes"], c["optimizer_nbytes"]

    found = []
    for own in by_ratio():
        cell, peak = results.get(f"whole/{own.key}"), results.get(f"memory/{own.key}")
        if cell is None:
            found.append([own.key, "not run", *[""] * 7])
            continue
        base = results.get(f"whole/{Whole('llm-pruner', own.ratio).key}") if own.ratio else None
        held, less = sum(parts(cell)), ""
        if base and own.recipe != "llm-pruner":
            less = f"{100 * (1 - held / sum(parts(base))):.1f} %"
        each_kind = [f"{peak[kind] / 1e6:.0f}" if peak and kind in peak else "not run" for kind in KINDS]
        found.append([own.key, *(f"{one / 1e6:.1f}" for one in parts(cell)), f"{held / 1e6:.1f}", less, *each_kind])
    heads = [
        "recipe, pruned", "weights, MB", "pairs", "AdamW", "sum", "below llm-pruner", "peak in recovery",
        "checkpointed", "peak in inference",
    ]  # fmt: skip
    return table(heads, found)


if __name__ == "__main__":
    measure(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
