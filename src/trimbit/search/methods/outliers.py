"""The same share of high channels at every site, chosen without a search: by diag H, as Atom does, or at random.

With a binary low format this is the layout of PTQ1.61 (arXiv:2502.13179). Baselines for learnt masks.
"""

import random
from typing import Literal

from trimbit.schema.found import Found
from trimbit.search.problem import Problem, SearchMethod
from trimbit.search.two_formats.config import TwoFormats
from trimbit.search.two_formats.tiles import TileProblem, default_nbytes, require_feasible


class Config(TwoFormats):
    """The formats, and the rule that chooses high channels."""

    by: Literal["second_moment", "random"] = "second_moment"


def search(problem: Problem, config: Config) -> Found:
    """The plan with the largest share of high channels within the budget.

    Raises:
        BudgetError: if the budget is outside the range of the formats.
    """
    require_feasible(problem, config)
    sites = TileProblem(problem, config)
    tiles = sites.uniform_within_budget
    rng = random.Random(problem.seed)
    high = {
        site: sites.top_channels(site, count)
        if config.by == "second_moment"
        else rng.sample(range(sites.channels[site]), count * config.tile)
        for site, count in tiles.items()
    }
    by = "largest diag H" if config.by == "second_moment" else "at random"
    summary = f"{sites.bits(sites.codes(tiles)):.3f} bits a code, channels {by} in {config.high.name}"
    return Found(plan=sites.plan(high, summary if any(tiles.values()) else f"{config.low.name} in all channels"))


METHOD = SearchMethod(
    paper="Atom, arXiv:2310.19102",
    config=Config,
    search=search,
    require_feasible=require_feasible,
    default_nbytes=default_nbytes,
    reads_moments=True,
)
