"""Two formats in every weight of the blocks: some channels of each site are high, all others low.

Shared by the searches that choose the high channels. A site stores its low channels first, then the high ones, each
part sorted by rising diag H of the site's inputs (as in arXiv:2310.19102), so that the channels of a group are alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

from trimbit.errors import BudgetError, RecipeError
from trimbit.measure.choices import sites_of
from trimbit.model.channels import order_dtype
from trimbit.model.resolved import resolve
from trimbit.schema.activations import ActRun
from trimbit.schema.plan import Plan
from trimbit.schema.precision import Run, row_nbytes
from trimbit.search.problem import NO_CHOICE, Problem
from trimbit.search.solvers import knapsack
from trimbit.search.two_formats.config import TwoFormats

High = Mapping[str, Sequence[int]]  # site -> its high channels


@dataclass(frozen=True)
class TileProblem:
    """The sites of a problem and the bytes of their high channels.

    Raises:
        RecipeError: if the tile does not divide the channels of a site, high does not have more bits than low, or
            something is pruned before the search.
    """

    problem: Problem
    mixed: TwoFormats

    def __post_init__(self) -> None:
        low, high = self.mixed.low, self.mixed.high
        if self.problem.space.kept:
            raise RecipeError("two formats in a weight need the whole model: leave `prune` out of the recipe")
        if low.bits >= high.bits:
            raise RecipeError(f"the high format {high.name} must have more bits than the low one, {low.name}")
        for site, channels in self.channels.items():
            if channels % self.mixed.tile:
                raise RecipeError(
                    f"a tile of {self.mixed.tile} channels does not divide the {channels} channels of {site}; "
                    "give another search.tile"
                )

    @cached_property
    def channels(self) -> dict[str, int]:
        """Channels of each site."""
        layout = self.problem.layout
        units = [unit for unit in layout.units.values() if unit.block is not None]
        return {site: layout.weights[names[0]].cols for unit in units for site, names in sites_of(layout, unit).items()}

    @cached_property
    def rows(self) -> dict[str, int]:
        """Rows of all weights that read each site: the number of codes in a channel."""
        return {site: sum(weight.rows for weight in self.problem.layout.readers(site)) for site in self.channels}

    @cached_property
    def second_moments(self) -> Mapping[str, Sequence[float]]:
        """Diag H of each site's inputs; without an oracle, falling numbers, so that orders are stored."""
        if self.problem.oracle is None:
            return {site: [-float(at) for at in range(count)] for site, count in self.channels.items()}
        return self.problem.oracle.channels().second_moments()

    def bits(self, codes: int) -> float:
        """Mean nominal bits per code when `codes` of them are high."""
        low, high = self.mixed.low.bits, self.mixed.high.bits
        return low + (high - low) * codes / self.all_codes

    def codes(self, tiles: Mapping[str, int]) -> int:
        """Codes in high channels."""
        return sum(self.rows[site] * self.mixed.tile * count for site, count in tiles.items())

    @cached_property
    def all_codes(self) -> int:
        """Codes in all channels."""
        return sum(self.rows[site] * count for site, count in self.channels.items())

    def uniform_tiles(self, share: float) -> dict[str, int]:
        """High tiles of each site for the same share of channels everywhere, as nearly as whole tiles allow.

        The next tile goes to the site with the smallest share of high channels so far, if it fits into the codes of
        `share`. Among equal sites it goes to one far from those that were served (van der Corput order of the blocks),
        so that early blocks get no more than late ones.
        """
        layout = self.problem.layout
        left, tiles = share * self.all_codes, dict.fromkeys(self.channels, 0)
        blocks = {site: layout.units[layout.readers(site)[0].unit].block for site in self.channels}
        queue = [(0.0, int(f"{blocks[site]:032b}"[::-1], 2), site) for site in self.channels]
        heapify(queue)
        while queue:
            _, turn, site = heappop(queue)
            cost = self.rows[site] * self.mixed.tile
            if cost <= left + 1e-6:
                tiles[site] += 1
                left -= cost
                held = tiles[site] * self.mixed.tile
                if held < self.channels[site]:
                    heappush(queue, (held / self.channels[site], turn, site))
        return tiles

    def top_channels(self, site: str, tiles: int) -> tuple[int, ...]:
        """The channels of largest diag H of a site, `tiles` tiles of them."""
        second_moments = self.second_moments[site]
        ranked = sorted(range(len(second_moments)), key=lambda channel: (-second_moments[channel], channel))
        return tuple(ranked[: tiles * self.mixed.tile])

    def plan(self, high: High, method: str, notes: tuple[str, ...] = ()) -> Plan:
        """The plan with the channels `high` in the high format."""
        problem, mixed = self.problem, self.mixed
        formats = {
            site: mixed.embedding if unit.block is None else mixed.low
            for unit in problem.layout.units.values()
            for site in sites_of(problem.layout, unit)
        }
        base = problem.plan({}, formats, method)
        weights, orders, acts = dict(base.weights), {}, {}
        for site, channels in self.channels.items():
            order = self._order(site, high[site])
            if order != tuple(range(channels)):
                orders[site] = order
            runs = self._runs(site, len(high[site]))
            weights |= dict.fromkeys((weight.name for weight in problem.layout.readers(site)), runs)
            rounding = {mixed.low: mixed.low_acts, mixed.high: mixed.high_acts}
            if any(rounding[run.precision] for run in runs):
                acts[site] = tuple(ActRun(count=run.count, precision=rounding[run.precision]) for run in runs)
        plan = base.model_copy(update={"weights": weights, "orders": orders, "acts": acts})
        return plan.with_provenance(nbytes=resolve(plan, problem.layout).file_nbytes, notes=notes)

    def _runs(self, site: str, high: int) -> tuple[Run, ...]:
        counts = ((self.channels[site] - high, self.mixed.low), (high, self.mixed.high))
        return tuple(Run(count=count, precision=precision) for count, precision in counts if count)

    def _order(self, site: str, high: Sequence[int]) -> tuple[int, ...]:
        chosen = set(high)
        channels = range(self.channels[site])
        key = self.second_moments[site].__getitem__ if self.mixed.sort else int
        low, rest = ([c for c in channels if (c in chosen) is kind] for kind in (False, True))
        return (*sorted(low, key=key), *sorted(rest, key=key))

    def plan_nbytes(self, tiles: Mapping[str, int]) -> int:
        """Bytes of a plan's files with these numbers of high tiles."""
        return self.plan({site: range(count * self.mixed.tile) for site, count in tiles.items()}, "").found_by.nbytes

    def site_nbytes(self, site: str, tiles: int) -> int:
        """Bytes of a site's weights with this number of high tiles, and of its order if that is stored."""
        layout, runs = self.problem.layout, self._runs(site, tiles * self.mixed.tile)
        folds = layout.readers(site)[0].col_axis == "mid" and self.problem.rotation is None
        ordered = self.mixed.sort or len(runs) > 1
        channels = self.channels[site]
        order = channels * order_dtype(channels).itemsize if ordered and not folds else 0
        return order + self.rows[site] * row_nbytes(runs)

    @cached_property
    def room_nbytes(self) -> int:
        """The part of the budget left for the sites; with other tiles the header may differ by some bytes."""
        tiles = self.uniform_within_budget
        return (
            self.problem.budget_nbytes
            - self.plan_nbytes(tiles)
            + sum(self.site_nbytes(*each) for each in tiles.items())
        )

    def fill_by_knapsack(self, losses: Mapping[str, Mapping[int, float]], ranked: High, what: str) -> Plan:
        """The plan of least summed loss within the budget, a multiple-choice knapsack.

        `losses` are by site and number of high tiles; these hold the first channels of `ranked`.

        Raises:
            NumericsError: if the solver stops without a solution.
        """
        options = {site: sorted(own) for site, own in losses.items()}
        groups = [[(self.site_nbytes(site, n), losses[site][n]) for n in own] for site, own in options.items()]

        def pick(capacity: int) -> dict[str, int] | None:
            solved = knapsack.knapsack(groups, capacity, knapsack.Config())
            if solved is None:
                return None
            return {site: own[at] for (site, own), at in zip(options.items(), solved.picked, strict=True)}

        return self._within(pick, ranked, what)

    def fill_by_logits(self, logits: Mapping[str, Tensor], what: str) -> Plan:
        """The plan of the highest logits within the budget: one threshold for all sites, up to whole tiles.

        A site's channels are cut into tiles by falling logit. Tiles of all sites are taken by falling mean, if their
        bytes still fit.
        """
        ranked = {site: own.sort(descending=True, stable=True) for site, own in logits.items()}
        means = {site: own.values.view(-1, self.mixed.tile).mean(-1).tolist() for site, own in ranked.items()}
        queue = sorted((-mean, tile, site) for site, own in means.items() for tile, mean in enumerate(own))

        def pick(capacity: int) -> dict[str, int] | None:
            tiles = dict.fromkeys(means, 0)
            left = capacity - sum(self.site_nbytes(site, 0) for site in tiles)
            if left < 0:
                return None
            for _, tile, site in queue:
                nbytes = self.site_nbytes(site, tile + 1) - self.site_nbytes(site, tile)
                if tiles[site] == tile and nbytes <= left:
                    tiles[site] += 1
                    left -= nbytes
            return tiles

        return self._within(pick, {site: own.indices.tolist() for site, own in ranked.items()}, what)

    def _within(self, pick: Callable[[int], dict[str, int] | None], ranked: High, what: str) -> Plan:
        """The plan of the tiles that `pick` gives for a limit in bytes, lowered until the files fit the budget.

        If the budget is so small that the header leaves no room, every site has the same share, and the plan's notes
        say so.
        """
        room = self.room_nbytes
        while True:
            tiles, notes = pick(room), tuple[str, ...]()
            if tiles is None:
                tiles, notes = self.uniform_within_budget, (NO_CHOICE.format("the same share of every site"),)
            high = {site: ranked[site][: count * self.mixed.tile] for site, count in tiles.items()}
            plan = self.plan(high, f"{self.bits(self.codes(tiles)):.3f} bits a code, {what}", notes)
            over = plan.found_by.nbytes - self.problem.budget_nbytes
            if over <= 0:
                return plan
            room -= over  # the header is that much longer

    def high(self, plan: Plan) -> High:
        """The high channels of a plan."""
        found = {}
        for site, count in self.channels.items():
            order = plan.orders.get(site, tuple(range(count)))
            runs = plan.weights[self.problem.layout.readers(site)[0].name]
            low = sum(run.count for run in runs if run.precision == self.mixed.low)
            found[site] = order[low:]
        return found

    def require_feasible(self) -> None:
        """Refuse a budget outside the range of the formats.

        Raises:
            BudgetError: naming the range.
        """
        least, most = self.plan_nbytes(self.uniform_tiles(0.0)), self.plan_nbytes(self.uniform_tiles(1.0))
        below, above = self.problem.budget_nbytes < least, self.problem.budget_nbytes > most and self.mixed.share > 0
        if below or above:
            kind, nbytes = ("largest that they fill", most) if above else ("smallest feasible budget", least)
            raise BudgetError(
                f"the budget of {self.problem.budget_nbytes:,} bytes is {'below' if below else 'above'} what "
                f"{self.mixed.low.name} and {self.mixed.high.name} reach: {least:,} to {most:,} bytes; the {kind} is "
                f"{nbytes:,} bytes (--budget {nbytes}B)"
            )

    @cached_property
    def uniform_within_budget(self) -> dict[str, int]:
        """High tiles of each site for the largest equal share that fits the budget."""
        if not self.mixed.share:
            return self.uniform_tiles(0.0)

        def fits(share: float) -> bool:
            return self.plan_nbytes(self.uniform_tiles(share)) <= self.problem.budget_nbytes

        if fits(1.0):
            return self.uniform_tiles(1.0)
        low, high = self.mixed.share if fits(self.mixed.share) else 0.0, 1.0
        for _ in range(20):  # precise to far less than a tile
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return self.uniform_tiles(low)


def default_nbytes(problem: Problem, config: TwoFormats) -> int:
    """Bytes with the configured share of high channels at every site."""
    sites = TileProblem(problem, config)
    return sites.plan_nbytes(sites.uniform_tiles(config.share))


def require_feasible(problem: Problem, config: TwoFormats) -> None:
    """Refuse a budget outside the range of the formats.

    Raises:
        BudgetError: naming the range.
        RecipeError: if the formats or the tile do not fit the model.
    """
    TileProblem(problem, config).require_feasible()


def as_masks(high: High, sites: TileProblem) -> dict[str, Tensor]:
    """Masks by site, one for high channels and zero for low ones."""
    masks = {site: torch.zeros(count) for site, count in sites.channels.items()}
    for site, channels in high.items():
        masks[site][list(channels)] = 1
    return masks
