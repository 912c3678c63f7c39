"""Is the importance of blocks stable: do three samples of calibration text rank them alike?

Cells: each estimator on the model pruned by 20 %; the samples are those of seeds 0 to 2. About 15 minutes per cell.
Alone: `python benchmarks/run.py qpruner.ranks --data DATA`
"""

from collections.abc import Iterator
from functools import partial
from itertools import combinations

from scipy.stats import spearmanr

from harness.bench import TRAIN, Bench
from harness.cells import Cell, Found, seeded
from harness.tables import Results, table
from qpruner.statistics import SEEDS as SAMPLES
from trimbit.pipeline.preflight import preflight
from trimbit.pipeline.prepare import layer_importance, prepare

SEEDS = (0,)  # of the model
SHARED_MINUTES = 0.0
ESTIMATORS = ("quantiles", "histogram")
RECIPE = "qpruner-2"


def overrides(estimator: str) -> tuple[str, ...]:
    """Overrides of the recipe."""
    return ("tune=null", f"importance.estimator={estimator}")


def cells(bench: Bench, seed: int) -> Iterator[Cell]:
    """One cell for each estimator."""
    for estimator in ESTIMATORS:
        yield Cell(
            key=seeded(f"ranks/{estimator}", seed), run=partial(agreement, bench, estimator, seed), minutes=15,
            seed=seed, texts=(bench.data / TRAIN,),
        )  # fmt: skip


def agreement(bench: Bench, estimator: str, seed: int) -> Found:
    """Spearman's rho of the blocks' importance for each pair of samples, and the importance by sample."""
    found = []
    for sample in SAMPLES:
        job = bench.job(RECIPE, sample, overrides(estimator), model_seed=seed)
        preflight(job, None)
        importance = layer_importance(job, prepare(job))
        found.append({key: own for key, own in importance.items() if key.count(".") == 1})
    pairs = [float(spearmanr([*a.values()], [b[key] for key in a]).statistic) for a, b in combinations(found, 2)]
    return {"spearman": pairs, "importance": found}


def rows(results: Results) -> list[str]:
    """A table of Spearman's rho by estimator."""
    found = []
    for estimator in ESTIMATORS:
        cell = results.get(f"ranks/{estimator}")
        found.append([estimator, ", ".join(f"{r:.2f}" for r in cell["spearman"]) if cell else "not run"])
    return table(["estimator", "Spearman's rho of the blocks, pairs of seeds"], found)
