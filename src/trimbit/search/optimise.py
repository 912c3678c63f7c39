"""Bayesian optimisation of ordinal variables under a known budget; the core of a search, which knows no models.

A point gives every variable a level, and every level costs bytes. What fits is counted in whole bytes, so nothing over
the limit is ever tried; only the damage is learnt, by a Gaussian process. A proposal is the point of most expected
improvement among untried ones that fit: random ones and neighbours of the best, climbed from there.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from trimbit.errors import NumericsError, RecipeError
from trimbit.precision import Data
from trimbit.progress import Progress

T = TypeVar("T")
Point = tuple[int, ...]  # a level of each variable
Evaluate = Callable[[Sequence[Point]], Iterable[tuple[Point, float]]]  # as each becomes known, in any order
Record = Callable[[int, Point, float], None]  # its place among all trials, the first 0
Ask = Callable[[Mapping[Point, float], torch.Generator], list[Point]]
PAGE = 4096  # bytes
CHUNK = 512  # points whose acquisition is computed at once


class Config(Data):
    """How many points are tried, and how hard each is looked for."""

    trials: int = Field(default=40, ge=1)  # ours: all points that are evaluated, the initial ones included
    initial: int = Field(default=10, ge=1)  # ours: the given start, and random points up to this number
    batch: int = Field(default=1, ge=1)  # ours: points proposed from the same results
    pool: int = Field(default=256, ge=1)  # ours: random points that the acquisition chooses from
    best: int = Field(default=3, ge=1)  # ours: tried points of least damage whose neighbours join the pool
    near: int = Field(default=128, ge=1)  # ours: random neighbours of a point that are swaps, and that are settled
    climbs: int = Field(default=20, ge=0)  # ours: times that the winner's neighbours may win
    steps: int = Field(default=50, ge=1)  # ours: iterations of the fit
    samples: int = Field(default=256, ge=1)  # ours: of the posterior, where points of a batch are pending
    smaller: int = Field(default=4, ge=0)  # ours: limits below the given one, for the Pareto set; a trial each


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """The space: for each variable the bytes and the ordinal value of its levels, the cheapest first; and the limit."""

    costs: tuple[tuple[int, ...], ...]
    values: tuple[tuple[float, ...], ...]
    limit: int

    def __post_init__(self) -> None:
        assert [len(costs) for costs in self.costs] == [len(values) for values in self.values]
        assert all(costs and list(costs) == sorted(costs) for costs in self.costs)

    @property
    def lowest(self) -> Point:
        """The point of fewest bytes."""
        return (0,) * len(self.costs)

    def nbytes(self, point: Point) -> int:
        """Bytes of a point."""
        return sum(costs[level] for costs, level in zip(self.costs, point, strict=True))

    def fits(self, point: Point) -> bool:
        """Whether a point is within the limit."""
        return self.nbytes(point) <= self.limit

    def features(self, points: Sequence[Point]) -> Float64[Tensor, "points variables"]:
        """The values of points, each variable scaled to [0, 1]."""
        scaled = [[(v - min(vs)) / ((max(vs) - min(vs)) or 1.0) for v in vs] for vs in self.values]
        rows = [[own[level] for own, level in zip(scaled, point, strict=True)] for point in points]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(points), len(self.costs))


def _settle(box: Box, point: Point, generator: torch.Generator, fixed: int | None = None) -> Point:
    """Lower random variables until the point fits, then raise random ones until nothing more does; all but `fixed`."""
    levels, left = list(point), box.limit - box.nbytes(point)
    for step in (-1, 1) if left < 0 else (1,):
        room = [level if step < 0 else len(c) - 1 - level for c, level in zip(box.costs, levels, strict=True)]
        moves = [i for i, count in enumerate(room) for _ in range(count) if i != fixed]
        for at in torch.randperm(len(moves), generator=generator).tolist():
            i = moves[at]
            more = box.costs[i][levels[i] + step] - box.costs[i][levels[i]]
            if more <= left if step > 0 else left < 0:
                levels[i] += step
                left -= more
    return tuple(levels)


def _steps(box: Box, point: Point) -> list[tuple[int, Point]]:
    """All moves of one variable by one level, over the limit or not, each with the variable."""
    return [
        (i, (*point[:i], to, *point[i + 1 :]))
        for i, level in enumerate(point)
        for to in (level - 1, level + 1)
        if 0 <= to < len(box.costs[i])
    ]


def neighbours(box: Box, point: Point, near: int, generator: torch.Generator) -> list[Point]:
    """Points near a point that fit.

    Those a step away; up to `near` random ones of these after settling the others; up to `near` random swaps, where one
    variable goes down and another one up.
    """
    steps = _steps(box, point)
    found = [moved for _, moved in steps]
    found += [_settle(box, moved, generator, fixed) for fixed, moved in _some(steps, near, generator)]
    downs = [i for i, level in enumerate(point) if level > 0]
    ups = [i for i, level in enumerate(point) if level < len(box.costs[i]) - 1]
    pairs = [(i, j) for i, j in product(downs, ups) if i != j]
    for down, up in _some(pairs, near, generator):
        found.append(tuple(level - (i == down) + (i == up) for i, level in enumerate(point)))
    return [moved for moved in dict.fromkeys(found) if moved != point and box.fits(moved)]


def _some(of: Sequence[T], count: int, generator: torch.Generator) -> list[T]:
    """Up to `count` random ones."""
    return [of[at] for at in torch.randperm(len(of), generator=generator)[:count].tolist()]


def feasible_points(box: Box, count: int, generator: torch.Generator, tried: Set[Point] = frozenset()) -> list[Point]:
    """Up to `count` distinct random points that fit and were not tried; fewer only if there are no more.

    They are points where nothing more fits, and where these run out, points a step away from them, and so on.
    """
    assert box.fits(box.lowest), "nothing fits"
    seen: dict[Point, None] = {}
    for _ in range(2 * count + 16):
        if len(seen.keys() - tried) >= count:
            break
        seen[_settle(box, box.lowest, generator)] = None
    queue = deque(seen)
    while queue and len(seen.keys() - tried) < count:  # single steps join everything that fits
        near = [moved for _, moved in _steps(box, queue.popleft()) if moved not in seen and box.fits(moved)]
        seen |= dict.fromkeys(near)
        queue += near
    return [point for point in seen if point not in tried][:count]


def require_botorch() -> None:
    """Refuse, before anything long, to search without the optional dependency.

    Raises:
        RecipeError: if BoTorch is missing.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".torch\.jit\.", DeprecationWarning)  # as it is imported
        try:
            import botorch  # noqa: F401
        except ImportError as err:
            raise RecipeError("search bayes needs botorch: pip install 'trimbit[bo]'") from err


@contextmanager
def _botorch(seed: int) -> Iterator[None]:
    """BoTorch with a seed of its own, and without its warnings of retries and jitter."""
    require_botorch()
    from botorch.exceptions import ModelFittingError, OptimizationWarning
    from linear_operator.utils.errors import NanError, NotPSDError
    from linear_operator.utils.warnings import NumericalWarning

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        for category in (OptimizationWarning, NumericalWarning):
            warnings.simplefilter("ignore", category)
        torch.manual_seed(seed)
        try:
            yield
        except (ModelFittingError, NanError, NotPSDError) as err:
            raise NumericsError(f"the Gaussian process of the search cannot be fitted to its results: {err}") from err


def _surrogate(x: Float64[Tensor, "points variables"], y: Float64[Tensor, " points"], steps: int) -> torch.nn.Module:
    """A Gaussian process with a constant mean and a scaled Matern-5/2 kernel, fitted by its marginal likelihood."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
    from gpytorch.kernels import ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood

    # code (botorch): length scales expected to grow with the square root of the number of variables
    matern = get_covar_module_with_dim_scaled_prior(ard_num_dims=x.shape[1], use_rbf_kernel=False)
    model: torch.nn.Module = SingleTaskGP(x, y[:, None], covar_module=ScaleKernel(matern), outcome_transform=None)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": steps}})
    return model


def _acquisition(
    model: torch.nn.Module, best: float, pending: Float64[Tensor, "pending variables"], samples: int, seed: int
) -> Callable[[Tensor], Tensor]:
    """The logarithm of the expected improvement on `best`: of one point, or of one together with the pending ones."""
    from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
    from botorch.sampling import SobolQMCNormalSampler

    if len(pending) == 0:
        alone: Callable[[Tensor], Tensor] = LogExpectedImprovement(model, best)
        return alone
    sampler = SobolQMCNormalSampler(torch.Size([samples]), seed=seed)
    together: Callable[[Tensor], Tensor] = qLogExpectedImprovement(model, best, sampler, X_pending=pending)
    return together


def _climb(
    box: Box, acquisition: Callable[[Tensor], Tensor], pool: Sequence[Point], taken: Set[Point],
    generator: torch.Generator, config: Config,
) -> Point | None:  # fmt: skip
    """The best of the pool, then of its neighbours, and so on while that is better; None if all of it is taken."""
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
    """Up to `batch` untried points that fit, to evaluate next, from the damage of those tried; fewer if there are none.

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


def _improvement(values: Sequence[float]) -> Float64[Tensor, " points"]:
    """How much better than the mean each damage is, in standard deviations."""
    damage = torch.tensor(values, dtype=torch.float64)
    return (damage.mean() - damage) / (damage.std(correction=0) or 1.0)


def smaller(box: Box, tried: Mapping[Point, float], config: Config, seed: int) -> list[Point]:
    """Within `config.smaller` limits, evenly from the fewest bytes up, the untried point of least expected damage.

    Raises:
        NumericsError: if the Gaussian process cannot be fitted.
    """
    generator, least = _generator(seed, len(tried)), box.nbytes(box.lowest)
    found: list[Point] = []
    with _botorch(seed):
        model: Any = _surrogate(box.features(list(tried)), _improvement(list(tried.values())), config.steps)
        for part in range(config.smaller):
            own = replace(box, limit=least + (box.limit - least) * part // config.smaller)
            taken = tried.keys() | found
            pool = feasible_points(own, config.pool, generator, taken)
            point = _climb(own, lambda x: model.posterior(x).mean.flatten(), pool, taken, generator, config)
            found += [] if point is None else [point]
    return found


def optimise(
    box: Box, start: Sequence[Point], evaluate: Evaluate, known: Mapping[Point, float], config: Config, seed: int,
    progress: Progress, record: Record,
) -> list[tuple[Point, float]]:  # fmt: skip
    """Evaluate the start and random points, then what is proposed: at most `config.trials` points, in their order.

    Args:
        box: the space.
        start: points to begin with.
        evaluate: gives the damage of points: of all initial ones, then of up to `config.batch` at a time.
        known: results of an interrupted run, in their order; they are trials that need no evaluation. A run that goes
            on ends like one that was not interrupted: a proposal depends on the seed and the results before it alone.
        config: how many points.
        seed: of the random points.
        progress: told how many trials are done.
        record: given each new result at once, and its place.

    Raises:
        NumericsError: if a damage is not finite, or the Gaussian process cannot be fitted.
    """

    def ask(found: Mapping[Point, float], generator: torch.Generator) -> list[Point]:
        return propose(box, list(found), list(found.values()), config.batch, generator, config)

    return _run(ask, box, start, evaluate, known, config, seed, progress, record)


def random_search(
    box: Box, start: Sequence[Point], evaluate: Evaluate, known: Mapping[Point, float], config: Config, seed: int,
    progress: Progress, record: Record,
) -> list[tuple[Point, float]]:  # fmt: skip
    """As `optimise`, but all points after the start are random: the baseline."""

    def ask(found: Mapping[Point, float], generator: torch.Generator) -> list[Point]:
        return feasible_points(box, config.batch, generator, found.keys())

    return _run(ask, box, start, evaluate, known, config, seed, progress, record)


def _run(
    ask: Ask, box: Box, start: Sequence[Point], evaluate: Evaluate, known: Mapping[Point, float], config: Config,
    seed: int, progress: Progress, record: Record,
) -> list[tuple[Point, float]]:  # fmt: skip
    assert all(box.fits(point) for point in (*start, *known)), "over the limit"
    first = list(dict.fromkeys(start))
    first += feasible_points(box, max(config.initial - len(first), 0), _generator(seed, 0), set(first))
    first = first[: config.trials]
    found = dict(known)
    progress(len(found), config.trials)

    def tell(points: Sequence[Point], begin: int) -> None:
        missing = [point for point in points if point not in found]
        for point, damage in evaluate(missing) if missing else ():
            if not math.isfinite(damage):
                raise NumericsError(f"the damage of point {point} is {damage}")
            found[point] = damage
            record(begin + points.index(point), point, damage)
            progress(len(found), config.trials)

    tell(first, 0)
    order = list(dict.fromkeys((*first, *known)))
    order = order[: len(order) - (len(order) - len(first)) % config.batch]  # without a batch that was interrupted
    while len(order) < config.trials:
        asked = ask({point: found[point] for point in order}, _generator(seed, len(order)))
        asked = asked[: config.trials - len(order)]
        if not asked:
            break
        tell(asked, len(order))
        order += asked
    return [(point, found[point]) for point in order[: config.trials]]


def _generator(seed: int, trial: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + trial)


def front(sizes: Sequence[int], values: Sequence[float]) -> list[int]:
    """Indices of the Pareto set of bytes and damage, the smallest first.

    Of points within 4 KiB the best one stays: the digits of a file's header are nothing to trade for.
    """
    found: list[int] = []
    begin = 0  # of the points of which the last one stays
    for at in sorted(pareto(list(zip(map(float, sizes), values, strict=True))), key=sizes.__getitem__):
        if found and sizes[at] - begin < PAGE:
            found[-1] = at
        else:
            found.append(at)
            begin = sizes[at]
    return found


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats: is at most as large in both, and smaller in one."""
    return [
        at for at, (a, b) in enumerate(points) if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)
    ]
