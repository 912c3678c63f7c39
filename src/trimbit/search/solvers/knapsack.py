"""The multiple-choice knapsack, solved by HiGHS."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from trimbit.errors import NumericsError
from trimbit.schema.base import Schema


class Config(Schema):
    """When the solver may stop."""

    gap: float = Field(default=1e-4, ge=0)  # relative optimality gap
    nodes: int = Field(default=2000, ge=1)  # branch-and-bound nodes: with similar blocks, proofs never end


class Solution(NamedTuple):
    """The picked item of each group, and the gap of the total damage to the optimum.

    `gap` is relative and proven; None: nothing was proven.
    """

    picked: list[int]
    gap: float | None


def knapsack(groups: list[list[tuple[int, float]]], capacity: int, config: Config) -> Solution | None:
    """One item (bytes, damage) of each group, of least total damage within `capacity` bytes; None if impossible.

    Raises:
        NumericsError: if the solver stops without a solution.
    """
    smallest = [min(range(len(group)), key=group.__getitem__) for group in groups]
    least = _nbytes(groups, smallest)
    if least > capacity:
        return None
    sizes = [len(group) for group in groups]
    nbytes = np.array([item[0] for group in groups for item in group], dtype=float)
    damage = np.array([item[1] for group in groups for item in group], dtype=float)
    rows = np.repeat(np.arange(len(groups)), sizes)
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(groups), len(rows)))
    unit = max(capacity, 1) / 1e4  # bytes are scaled for the solver's tolerances; the sum is checked in whole bytes
    starts = np.cumsum([0, *sizes[:-1]])
    target = capacity
    while target >= least:
        constraints = [
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array(nbytes[None] / unit), -np.inf, target / unit),
        ]
        options = {"mip_rel_gap": config.gap, "node_limit": config.nodes}
        with _silenced_stdout():
            result = milp(
                damage, integrality=np.ones(len(rows)), bounds=Bounds(0, 1), options=options, constraints=constraints
            )
        if result.x is None:
            raise NumericsError(
                f"the solver of the knapsack stopped without a plan ({result.message}); allow more nodes"
            )
        picked = [int(np.argmax(result.x[start : start + size])) for start, size in zip(starts, sizes, strict=True)]
        over = _nbytes(groups, picked) - capacity
        if over <= 0:
            return Solution(picked, max(0.0, float(result.mip_gap)))
        target -= over  # within the solver's tolerances, but not within the capacity
    return Solution(smallest, None)  # what is left is below the solver's tolerances


def _nbytes(groups: list[list[tuple[int, float]]], picked: list[int]) -> int:
    return sum(group[at][0] for group, at in zip(groups, picked, strict=True))


@contextmanager
def _silenced_stdout() -> Iterator[None]:
    """Silence HiGHS, which prints debugging lines to the C standard output, where results go."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
