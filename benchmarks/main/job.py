"""How much time and memory does the whole job take, and does it give the same bytes twice?

One cell: `trimbit compress` on text sampled from the model, run twice, each time in its own process with its own cache.
About an hour. Alone: `python benchmarks/run.py main.job --data DATA`
"""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.bench import Bench
from harness.cells import Cell, Found, seeded
from harness.process import measured
from harness.records import run_fields
from harness.tables import Results
from trimbit.artifact.files import weight_nbytes

SEEDS = (0,)
SHARED_MINUTES = 0.0
RECIPE, BUDGET = "demo", "72MB"
RUNS = 2


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """The one cell."""
    yield Cell(key=seeded(f"job/{RECIPE}/{BUDGET}", seed), run=partial(twice, bench, seed), minutes=60, seed=seed)


def twice(bench: Bench, seed: int, recipe: str = RECIPE, budget: str = BUDGET) -> Found:
    """Seconds, peak memory and weight hash of each of two runs that share nothing, and the record of the last one."""
    original = bench.original(seed)
    _, imports = measured(["-c", "import trimbit.cli.main, trimbit.pipeline.flow"])
    own: dict[str, list[float | int | str]] = {"seconds_each": [], "peak_rss_above_imports": [], "sha256": []}
    record: Found = {}
    for _ in range(RUNS):
        with TemporaryDirectory(dir=bench.work) as folder:
            out = Path(folder) / "out"
            command = ["-m", "trimbit.cli.main", "compress", str(original), str(out)]
            command += ["--budget", budget, "--recipe", recipe, "--seed", str(seed)]
            seconds, peak = measured(command, Path(folder) / "cache")
            own["seconds_each"].append(round(seconds, 1))
            own["peak_rss_above_imports"].append(peak - imports)
            own["sha256"].append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
            record = run_fields(out)
    return record | own | {"imports": imports, "memory_limit": round(1.5 * weight_nbytes(original)) + 2**30}


def rows(results: Results) -> list[str]:
    """The result in a sentence."""
    job = results.get(f"job/{RECIPE}/{BUDGET}")
    if job is None:
        return []
    took, peaks = job["seconds_each"], [peak / 2**20 for peak in job["peak_rss_above_imports"]]
    return [
        f"`trimbit compress --recipe {RECIPE} --budget {BUDGET}`, twice, each in a cache of its own: "
        f"{took[0] / 60:.1f} and {took[1] / 60:.1f} minutes; peak resident memory above the imports' "
        f"{peaks[0]:.0f} and {peaks[1]:.0f} MiB (1.5 x the bf16 model + 1 GiB is {job['memory_limit'] / 2**20:.0f} "
        f"MiB); model.safetensors is {'the same to the byte' if len(set(job['sha256'])) == 1 else 'NOT the same'}."
    ]
