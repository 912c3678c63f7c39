"""Bayesian optimisation of ordinal variables under a known budget; it knows nothing of models.

Bytes are counted exactly, so no point over the limit is tried; a Gaussian process learns only the damage. A proposal
is the untried point within the limit that has the largest expected improvement, found by hill climbing from the best
of random points and of neighbours of the best tried points.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from trimbit.errors import NumericsError
from trimbit.jobs.progress import Progress
from trimbit.schema.base import Schema
from trimbit.search.solvers.box import Box, Point, feasible_points, neighbours
from trimbit.search.solvers.gaussian_process import _acquisition, _botorch, _improvement, _surrogate

Evaluate = Callable[[Sequence[Point]], Iterable[tuple[Point, float]]]  # as each becomes known, in any order
Ask = Callable[[Mapping[Point, float], torch.Generator], list[Point]]
CHUNK = 512  # points whose acquisition is computed at once


class Config(Schema):
    """The number of points to try, and the effort of finding each."""

    trials: int = Field(default=40, ge=1)  # ours: all points that are evaluated, the initial ones included
    initial: int = Field(default=10, ge=1)  # ours: the given start, filled up with random points
    batch: int = Field(default=1, ge=1)  # ours: points proposed from the same results
    pool: int = Field(default=256, ge=1)  # ours: random points that the acquisition chooses from
    best: int = Field(default=3, ge=1)  # ours: tried points of least damage whose neighbours join the pool
    near: int = Field(default=128, ge=1)  # ours: random neighbours of each kind, swaps and settled steps
    climbs: int = Field(default=20, ge=0)  # ours: most steps of hill climbing
    steps: int = Field(default=50, ge=1)  # ours: iterations of the fit
    samples: int = Field(default=256, ge=1)  # ours: of the posterior, if points of a batch are pending
    smaller: int = Field(default=4, ge=0)  # ours: smaller limits for the Pareto set; a trial each


def _climb(
    box: Box, acquisition: Callable[[Tensor], Tensor], pool: Sequence[Point], taken: Set[Point],
    generator: torch.Generator, config: Config,
) -> Point | None:  # fmt: skip
    """Climb from the best point of the pool to better neighbours; None if the whole pool is taken."""
    winner, score = None, -math.inf
    for _ in range(config.climbs + 1):
        pool = [point for point in pool if point not in taken]
        if not pool:
            break
        with torch.no_grad():
            scores = torch.cat([acquisition(x[:, None]) for x in box.features(pool).split(CHUNK)])
        if bool(scores.isnan().any()):
            raise NumericsError("the expected improvement of a point is not a number")
        at = int(scores.argmax())
        if winner is not None and float(scores[at]) <= score:
            break
        winner, score = pool[at], float(scores[at])
        pool = neighbours(box, winner, config.near, generator)
    return winner


def propose(
    box: Box, points: Sequence[Point], values: Sequence[float], batch: int, generator: torch.Generator, config: Config
) -> list[Point]:
    """Propose up to `batch` untried points that fit, from the damage of tried ones; fewer if no more are found.

    Raises:
        NumericsError: if the Gaussian process cannot be fitted.
    """
    tried = set(points)
    pool = feasible_points(box, max(config.pool, batch), generator, tried)
    order = sorted(range(len(points)), key=lambda at: values[at])
    for at in order[: config.best]:
        pool += neighbours(box, points[at], config.near, generator)
    pool = list(dict.fromkeys(pool))
    y = _improvement(values)
    seed = int(torch.randint(2**31, (), generator=generator))
    chosen: list[Point] = []
    with _botorch(seed):
        model = _surrogate(box.features(points), y, config.steps)
        for _ in range(batch):
            acquisition = _acquisition(model, float(y.max()), box.features(chosen), config.samples, seed)
            point = _climb(box, acquisition, pool, tried.union(chosen), generator, config)
            if point is None:
                break
            chosen.append(point)
    return chosen


def smaller(box: Box, tried: Mapping[Point, float], config: Config, seed: int) -> list[Point]:
    """The untried point of least expected damage within each of `config.smaller` limits, from the fewest bytes up.

    Raises:
        NumericsError: if the Gaussian process cannot be fitted.
    """
    generator, least = _generator(seed, len(tried)), box.nbytes(box.lowest)
    found: list[Point] = []
    with _botorch(seed):
        model: Any = _surrogate(box.features(list(tried)), _improvement(list(tried.values())), config.steps)
        for part in range(config.smaller):
            own = replace(box, room_nbytes=least + (box.room_nbytes - least) * part // config.smaller)
            taken = tried.keys() | found
            pool = feasible_points(own, config.pool, generator, taken)
            point = _climb(own, lambda x: model.posterior(x).mean.flatten(), pool, taken, generator, config)
            found += [] if point is None else [point]
    return found


def optimise(
    box: Box, start: Sequence[Point], evaluate: Evaluate, config: Config, seed: int, progress: Progress
) -> list[tuple[Point, float]]:  # fmt: skip
    """Evaluate the start, random points, then proposals: at most `config.trials` points, returned in this order.

    A proposal depends only on the seed and the results before it: if `evaluate` remembers its results, an interrupted
    run goes on as if it had not stopped.

    Args:
        box: the space.
        start: points to begin with.
        evaluate: gives the damage of points: of all initial ones, then of up to `config.batch` at a time.
        config: how many points.
        seed: for the random points.
        progress: called with the number of trials done.

    Raises:
        NumericsError: if a damage is not finite, or the Gaussian process cannot be fitted.
    """

    def ask(found: Mapping[Point, float], generator: torch.Generator) -> list[Point]:
        return propose(box, list(found), list(found.values()), config.batch, generator, config)

    return _run(ask, box, start, evaluate, config, seed, progress)


def random_search(
    box: Box, start: Sequence[Point], evaluate: Evaluate, config: Config, seed: int, progress: Progress
) -> list[tuple[Point, float]]:  # fmt: skip
    """As `optimise`, but all points after the start are random: the baseline."""

    def ask(found: Mapping[Point, float], generator: torch.Generator) -> list[Point]:
        return feasible_points(box, config.batch, generator, found.keys())

    return _run(ask, box, start, evaluate, config, seed, progress)


def _run(
    ask: Ask, box: Box, start: Sequence[Point], evaluate: Evaluate, config: Config, seed: int, progress: Progress
) -> list[tuple[Point, float]]:  # fmt: skip
    assert all(box.fits(point) for point in start), "over the limit"
    asked = list(dict.fromkeys(start))
    asked += feasible_points(box, max(config.initial - len(asked), 0), _generator(seed, 0), set(asked))
    found: dict[Point, float] = {}
    while asked := asked[: config.trials - len(found)]:
        values: dict[Point, float] = {}
        for point, damage in evaluate(asked):
            if not math.isfinite(damage):
                raise NumericsError(f"the damage of point {point} is {damage}")
            values[point] = damage
            progress(len(found) + len(values), config.trials)
        found |= {point: values[point] for point in asked}
        asked = ask(found, _generator(seed, len(found))) if len(found) < config.trials else []
    return list(found.items())


def _generator(seed: int, trial: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + trial)
