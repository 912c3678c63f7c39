"""The main job's figures: rounding against GPTQ, uniform against knapsack at five file sizes, and the job itself.

    python benchmarks/bench_main.py .models/SmolLM2-135M-Instruct.Q4_1.gguf --data DATA [--only PART]

Each cell is stored in benchmarks/results/main.json as soon as it is done, and a cell that is there is not run again;
docs/benchmarks.md is drawn from it at the end. Models are taken off their 4-bit grid first (benchmarks/offgrid.py);
perplexity is on WikiText-2 test, context 2048, the first 16 windows; calibration is on WikiText-2 train. The job is
`trimbit compress` in a process and a cache of its own, twice, on text sampled from the model.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from offgrid import write_off_grid
from trimbit.artifact.files import weight_nbytes
from trimbit.calibrate import text as texts
from trimbit.evaluate.perplexity import final_hidden, score
from trimbit.evaluate.speed import hardware
from trimbit.jobs.cache import source_digest
from trimbit.measure.choices import background_of
from trimbit.pipeline.recipes import load_recipe
from trimbit.pipeline.session import Session, open_session
from trimbit.runtime.load import load_model, load_tokenizer
from trimbit.schema.budget import Budget
from trimbit.schema.plan import Plan
from trimbit.schema.precision import BF16, parse_precision

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "main.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"
WORK = HERE / ".work"
CONTEXT, WINDOWS = 2048, 16
BUDGETS = ("90MB", "72MB", "55MB", "45MB", "36MB")
RECIPES = ("uniform-gptq", "knapsack-nopruning", "knapsack")
BACKGROUNDS = {"near the lossless model": "uint6g64", "uniform plan nearest the budget": "null"}
JOB = ("demo", "72MB")
METHODS = {"rtn": ("uniform-rtn", ()), "gptq": ("uniform-gptq", ())}


class Bench:
    """Runs cells and keeps their results."""

    def __init__(self, source: Path, folder: Path, stored: Path = RESULTS) -> None:
        self.source, self.folder, self.stored = source, folder, stored
        self.results = json.loads(stored.read_text()) if stored.exists() else {}
        WORK.mkdir(exist_ok=True)

    def off_grid(self, seed: int) -> Path:
        path = WORK / f"offgrid-{seed}"
        if not path.exists():
            beside = path.with_suffix(".partial")
            write_off_grid(self.source, beside, seed)
            beside.rename(path)
        return path

    def cell(self, key: str, run) -> None:
        if key in self.results:
            return
        started = time.perf_counter()
        found = run()
        used = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
        gpus = [torch.cuda.get_device_name()] if used else []
        found |= {
            "seconds": round(time.perf_counter() - started, 1),
            "hardware": ", ".join([hardware(), *gpus]),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "code": source_digest(),  # of the package
        }
        if self.stored.exists():
            self.results = json.loads(self.stored.read_text())  # with what others have stored meanwhile
        self.results[key] = found
        self.stored.parent.mkdir(exist_ok=True)
        self.stored.write_text(json.dumps(self.results, indent=1, sort_keys=True) + "\n")
        print(key, json.dumps(found), flush=True)

    def quality(self, path: Path, original: Path) -> dict:
        """ppl@2048, KL and agreement on WikiText-2 test, in bf16."""
        windows = texts.evaluation_windows(
            self.folder / "wikitext-2" / "wiki.test.raw", load_tokenizer(original), context=CONTEXT, limit=WINDOWS
        )
        dense = load_model(original, torch.bfloat16)
        cached = WORK / f"dense-{original.name}.safetensors"
        if not cached.exists():
            save_file({str(at): final_hidden(dense, window).clone() for at, window in enumerate(windows)}, cached)
        reference = load_file(cached)
        model = load_model(path, torch.bfloat16)
        totals = torch.zeros(3, dtype=torch.float64)
        for at, window in enumerate(windows):
            totals += score(model, final_hidden(model, window), window, (dense, reference[str(at)]))
        nll, kl, top1 = (totals / (len(windows) * (CONTEXT - 1))).tolist()
        return {"ppl@2048": math.exp(nll), "kl": kl, "top1": top1}

    def session(self, model: Path, recipe: str, seed: int, overrides: tuple[str, ...] = ()) -> Session:
        text = self.folder / "wikitext-2" / "wiki.train.prefix.raw"
        return open_session(model, load_recipe(recipe, overrides), calibration=str(text), seed=seed)

    def write(self, session: Session, plan: Plan, original: Path) -> dict:
        out = WORK / "out"
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        written = session.write(plan, out)
        found = {
            "apply_seconds": round(time.perf_counter() - started, 1),  # next to nothing for a plan tried before
            "nbytes": weight_nbytes(out),
            "held_out_kl": written.found_by.measured_damage,
        }
        return found | self.quality(out, original)

    def dense(self, seed: int) -> dict:
        original = self.off_grid(seed)
        return {"nbytes": weight_nbytes(original)} | self.quality(original, original)

    def grid(self, method: str, bits: int, seed: int) -> dict:
        """Block linears only, group 64, with a zero point."""
        original = self.off_grid(seed)
        session = self.session(original, METHODS[method][0], seed)
        problem = session.problem(0, ready=False)
        plan = problem.uniform(parse_precision(f"uint{bits}g64"), f"{method} {bits}")
        formats = {
            site: p if site.startswith("blocks.") else BF16
            for site, p in background_of(plan, session.layout).formats.items()
        }
        return self.write(session, problem.plan({}, formats, f"{method} {bits}, blocks only"), original)

    def job(self, recipe: str, budget: str) -> dict:
        """Seconds, peak memory and the hash of the weights of two runs that share nothing."""
        original, seconds, peaks, hashes = self.off_grid(0), [], [], []
        _, imports = measured_process([sys.executable, "-c", "import trimbit.cli.main, trimbit.pipeline.session"], None)
        for _ in range(2):
            with tempfile.TemporaryDirectory(dir=WORK) as folder:
                out = Path(folder) / "out"
                command = [sys.executable, "-m", "trimbit.cli.main", "compress", str(original), str(out)]
                took, peak = measured_process(
                    [*command, "--budget", budget, "--recipe", recipe], Path(folder) / "cache"
                )
                seconds.append(round(took, 1))
                peaks.append(peak - imports)
                hashes.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
        return {
            "seconds_each": seconds, "peak_rss_above_imports": peaks, "imports": imports, "sha256": hashes,
            "memory_limit": round(1.5 * weight_nbytes(original)) + 2**30,
        }  # fmt: skip

    def background(self, where: str, budget: str) -> dict:
        """How well damage adds up that was measured near the lossless model, or in the uniform plan nearest the budget.

        The whole is put together from candidates, as the sum is of their damage.
        """
        small = (
            "space.formats=[uint2g64, uint3g64, uint4g64]",
            "space.embedding_formats=[uint3g64, uint4g64, uint5g64, uint6g64]",
            "measure.rows=4",
            "measure.length=256",
            "search.uniform=null",
            f"search.background={BACKGROUNDS[where]}",
        )
        session = self.session(self.off_grid(0), "knapsack-nopruning", 0, small)
        session.judging.trial = session.judging.evaluate
        found = session.find_plan(Budget.parse(budget)).found_by
        return {"predicted": found.predicted_damage, "measured": found.measured_damage}

    def budget(self, recipe: str, budget: str, seed: int) -> dict:
        original = self.off_grid(seed)
        session = self.session(original, recipe, seed)
        limit = Budget.parse(budget)
        started = time.perf_counter()
        plan = session.find_plan(limit)
        search_seconds = round(time.perf_counter() - started, 1)
        found = self.write(session, plan, original)
        cut = plan.widths
        bits = {}
        for name, runs in plan.weights.items():
            for run in runs:
                bits[run.precision.name] = (
                    bits.get(run.precision.name, 0) + session.layout.weights[name].rows * run.count
                )
        return found | {
            "limit": limit.nbytes(session.layout.parameters),
            "used": found["nbytes"] / limit.nbytes(session.layout.parameters),
            "search_seconds": search_seconds, "method": plan.found_by.method,
            "predicted_damage": plan.found_by.predicted_damage, "notes": list(plan.found_by.notes), "cut": cut,
            "weights_by_format": bits,
        }  # fmt: skip


def measured_process(command: list[str], cache: Path | None) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process that ends well.

    A small process stands between: Linux counts the memory of the one that starts a process as its own peak.
    """
    report = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr); "
    report += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    environment = os.environ | ({"TRIMBIT_CACHE": str(cache)} if cache else {})
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", report, *command], env=environment, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - started, int(done.stdout)


def command_line(doc: str | None, parts: Sequence[str], more: Sequence[str] = ()) -> argparse.Namespace:
    """The model, the data, and which parts are run: those that are named, or all, without `more`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=(*parts, *more), default=parts)
    os.environ.setdefault("TRIMBIT_CACHE", str(WORK / "cache"))
    return parser.parse_args()


def tables(results: dict) -> str:
    """The results as Markdown tables."""
    lines = ["| block weights, group 64 with zero point | bits | seed 0 | seed 1 | seed 2 |", "|---|---|---|---|---|"]
    seeds = (0, 1, 2)

    def ppl(key: str) -> str:
        return f"{results[key]['ppl@2048']:.2f}" if key in results else "not run"

    lines.append("| dense | 16 | " + " | ".join(ppl(f"dense/seed {seed}") for seed in seeds) + " |")
    for method in METHODS:
        for bits in (4, 3, 2):
            cells = " | ".join(ppl(f"grid/{method}/{bits} bits/seed {seed}") for seed in seeds)
            lines.append(f"| {method} | {bits} | {cells} |")
    lines += [
        "",
        "| budget | recipe | ppl@2048 | KL | same first choice | bytes used | chosen | sub-blocks cut |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for budget in BUDGETS:
        for recipe in RECIPES:
            cell = results.get(f"budget/{recipe}/{budget}")
            if cell is None:
                lines.append(f"| {budget} | {recipe} | not run | | | | | |")
                continue
            lines.append(
                f"| {budget} | {recipe} | {cell['ppl@2048']:.2f} | {cell['kl']:.3f} | {100 * cell['top1']:.1f} % | "
                f"{100 * cell['used']:.2f} % | {cell['method']} | {len(cell['cut'])} |"
            )
    lines += ["", "| budget | damage measured | predicted KL | KL of the whole |", "|---|---|---|---|"]
    for budget in ("72MB", "55MB", "45MB"):
        for where in BACKGROUNDS:
            cell = results.get(f"background/{where}/{budget}")
            figures = f"{cell['predicted']:.3f} | {cell['measured']:.3f}" if cell else "not run |"
            lines.append(f"| {budget} | {where} | {figures} |")
    job = results.get(f"job/{JOB[0]}/{JOB[1]}")
    if job is not None:
        took, peaks = job["seconds_each"], [peak / 2**20 for peak in job["peak_rss_above_imports"]]
        lines += [
            "",
            f"`trimbit compress --recipe {JOB[0]} --budget {JOB[1]}`, twice, each in a cache of its own: "
            f"{took[0] / 60:.1f} and {took[1] / 60:.1f} minutes; peak resident memory above the imports' "
            f"{peaks[0]:.0f} and {peaks[1]:.0f} MiB (1.5 x the bf16 model + 1 GiB is {job['memory_limit'] / 2**20:.0f} "
            f"MiB); model.safetensors is {'the same to the byte' if len(set(job['sha256'])) == 1 else 'NOT the same'}.",
        ]
    return "\n".join(lines) + "\n"


def write_tables(path: Path, text: str, name: str = "tables") -> None:
    """Replace the part of a page between its markers."""
    before, start, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    assert start, f"{path} has no place for {name}"
    assert end, f"{path} does not end {name}"
    path.write_text(f"{before}{start}\n{text}{end}{after}", encoding="utf-8")


def draw(results: dict) -> None:
    """Perplexity against the size of the weight file, a line a recipe, as docs/budgets.png."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for recipe, mark in zip(RECIPES, "s^o", strict=True):
        cells = [results[key] for budget in BUDGETS if (key := f"budget/{recipe}/{budget}") in results]
        sizes, ppls = [cell["nbytes"] / 1e6 for cell in cells], [cell["ppl@2048"] for cell in cells]
        axes.plot(sizes, ppls, marker=mark, label=recipe)
    dense = results.get("dense/seed 0")
    if dense:
        label = f"original, {dense['nbytes'] / 1e6:.0f} MB: {dense['ppl@2048']:.1f}"
        axes.axhline(dense["ppl@2048"], color="grey", linestyle=":", label=label)
    axes.set(yscale="log", xlabel="weight file, MB", ylabel="ppl@2048, WikiText-2 test", title="SmolLM2-135M")
    ticks = [20, 30, 50, 100, 200, 500, 1000, 2000]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE.parent / "docs" / "budgets.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", choices=("grid", "background", "budgets", "job"))
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    os.environ.setdefault("TRIMBIT_CACHE", str(WORK / "cache"))
    bench = Bench(options.source, options.data)
    if options.only in {None, "grid"}:
        for seed in options.seeds:
            bench.cell(f"dense/seed {seed}", lambda seed=seed: bench.dense(seed))
            for method in METHODS:
                for bits in (4, 3, 2):
                    bench.cell(
                        f"grid/{method}/{bits} bits/seed {seed}", lambda m=method, b=bits, s=seed: bench.grid(m, b, s)
                    )
    if options.only in {None, "background"}:
        for budget in ("72MB", "55MB", "45MB"):
            for where in BACKGROUNDS:
                bench.cell(f"background/{where}/{budget}", lambda w=where, b=budget: bench.background(w, b))
    if options.only in {None, "job"}:
        bench.cell(f"job/{JOB[0]}/{JOB[1]}", lambda: bench.job(*JOB))
    if options.only in {None, "budgets"}:
        for budget in options.budgets:
            for recipe in reversed(RECIPES):  # what the widest search tries, the others need not apply again
                bench.cell(f"budget/{recipe}/{budget}", lambda r=recipe, b=budget: bench.budget(r, b, 0))
    write_tables(PAGE, tables(bench.results))
    draw(bench.results)


if __name__ == "__main__":
    main()
