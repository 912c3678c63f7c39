"""What several tables need: paired differences, means with standard deviations, rows by seed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

import numpy as np

from harness.cells import Found
from harness.tables import Results

SEEDS = (0, 1, 2)


def paired(own: Mapping[str, str], base: Mapping[str, str]) -> tuple[float, float]:
    """Mean difference over tasks, in percentage points, and its standard error; documents are paired."""
    means, variances = [], []
    for task, answers in own.items():
        gains = np.array([int(a) - int(b) for a, b in zip(answers, base[task], strict=True)])
        means.append(float(gains.mean()))
        variances.append(float(gains.var(ddof=1)) / len(gains))
    return 100 * float(np.mean(means)), 100 * math.sqrt(sum(variances)) / len(variances)


def mean_and_sd(values: Sequence[float]) -> str:
    """The mean and the standard deviation of a sample, as text."""
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def seed_rows(
    results: Results, part: str, kinds: Iterable[str], width: int, figures: Callable[[str, int, Found], list[str]]
) -> list[list[str]]:
    """A row of `width` figures for each kind and seed."""
    found = []
    for kind, seed in product(kinds, SEEDS):
        cell = results.get(f"{part}/{kind}/seed {seed}")
        own = figures(kind, seed, cell) if cell else ["not run", *[""] * (width - 1)]
        found.append([kind, str(seed), *own])
    return found
