"""QPruner's figures, so far: how well a model does before training, by how its low-rank pairs start.

    python benchmarks/bench_qpruner.py .models/SmolLM2-135M-Instruct.Q4_1.gguf --data DATA

Each cell is stored in benchmarks/results/qpruner.json as soon as it is done, and a cell that is there is not run again;
docs/qpruner.md is drawn from it at the end. Model, calibration, perplexity and KL as in bench_main.py; seed 0.
"""

import argparse
import os
import shutil
from pathlib import Path

from bench_main import HERE, WORK, Bench, write_tables
from trimbit.artifact import weight_nbytes
from trimbit.pipeline import compress

RESULTS = HERE / "results" / "qpruner.json"
PAGE = HERE.parent / "docs" / "qpruner.md"
FORMATS = {4: "nf4g64", 3: "uint3g64", 2: "uint2g64"}
STARTS = ("zeros", "loftq", "qera")
RANKS = (8, 32)


class Pairs(Bench):
    """Cells about low-rank pairs."""

    def start(self, bits: int, start: str, rank: int) -> dict:
        """KL of the model before any training, its blocks in one format, the table in bf16."""
        original, out = self.off_grid(0), WORK / "pairs"
        shutil.rmtree(out, ignore_errors=True)
        own = ("tune=null", "quant.scales=mse", f"search.blocks={FORMATS[bits]}")
        pairs = (f"lowrank.start={start}", f"lowrank.rank={rank}")
        plan = compress(self.session(original, "loftq-only", 0, (*own, *pairs)), None, out)
        kl = plan.found_by.measured_damage
        return {"nbytes": weight_nbytes(out), "held_out_kl": kl} | self.quality(out, original)


def cells() -> list[tuple[int, str, int]]:
    """(bits, start, rank); zeros change nothing, whatever their rank."""
    return [
        (bits, start, rank)
        for rank in RANKS
        for bits in FORMATS
        for start in STARTS
        if start != "zeros" or rank == RANKS[0]
    ]


def name(bits: int, start: str, rank: int) -> str:
    return f"start/{bits} bits/{start}" + (f" {rank}" if start != "zeros" else "")


def tables(results: dict) -> str:
    """The results as Markdown tables."""
    columns = [("zeros", RANKS[0]), *((start, rank) for rank in RANKS for start in STARTS[1:])]
    heads = ("zeros", *(f"{start}, rank {rank}" for start, rank in columns[1:]))
    lines = [f"| blocks | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for bits, precision in FORMATS.items():
        found = [results.get(name(bits, start, rank)) for start, rank in columns]
        figures = " | ".join(f"{c['kl']:.4f} (ppl {c['ppl@2048']:.2f})" if c else "not run" for c in found)
        lines.append(f"| {precision} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("TRIMBIT_CACHE", str(WORK / "cache"))
    bench = Pairs(options.source, options.data, RESULTS)
    for bits, start, rank in cells():
        bench.cell(name(bits, start, rank), lambda b=bits, s=start, r=rank: bench.start(b, s, r))
    write_tables(PAGE, tables(bench.results))


if __name__ == "__main__":
    main()
