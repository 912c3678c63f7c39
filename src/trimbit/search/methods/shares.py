"""The number of high channels at each site by measured damage: a knapsack over the sites' shares.

High channels are always those of largest diag H; the search chooses how many. The KL of the whole model is measured
with one site at another share and all others at a common one; the changes are taken to add up.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from trimbit.schema.found import Found
from trimbit.search.effort import Effort
from trimbit.search.problem import Problem, SearchMethod
from trimbit.search.two_formats.config import ErrorModels, MaskedSearch
from trimbit.search.two_formats.tiles import TileProblem, as_masks, default_nbytes, require_feasible

PAPER = "this project; HiGHS through scipy.optimize.milp"
NEEDS: tuple[str, ...] = ()
READS = "moments"


class Config(MaskedSearch):
    """The formats, and the shares and rows to measure."""

    factors: tuple[float, ...] = (0.0, 0.5, 1.5, 2.0, 3.0, 4.0)  # ours: on the common share, which fits the budget
    error_model: ErrorModels = "expected"  # ours
    rows: int = Field(default=4, ge=1)  # ours: the first of the training text
    length: int = Field(default=512, ge=16)  # ours

    def compared(self, rows: int) -> int:
        """The rows that damage is measured on, however many there are."""
        return self.rows


def result_fields(config: Config) -> dict[str, Any]:
    """The fields of the configuration that decide the measurements."""
    return config.model_dump(mode="json", exclude={"dense"})


def cost(problem: Problem, config: Config) -> Effort:
    """Rows under masks: each share of each site, from the site's block on, which is half the model on average."""
    sites = TileProblem(problem, config)
    base = sites.uniform_within_budget
    changes = sum(len(_menu(site, config, sites, base)) - 1 for site in base)
    return Effort(masked_rows=config.rows * (1 + changes // 2), formats=(config.low, config.high))


def search(problem: Problem, config: Config) -> Found:
    """The plan of least summed damage within the budget.

    Raises:
        BudgetError: if the budget is outside the range of the formats.
    """
    require_feasible(problem, config)
    sites = TileProblem(problem, config)
    ranked = {site: sites.top_channels(site, count // config.tile) for site, count in sites.channels.items()}
    losses = measure(problem, config, sites)
    return Found(plan=sites.fill_by_knapsack(losses, ranked, f"shares by measured KL in {config.high.name}"))


def measure(problem: Problem, config: Config, sites: TileProblem) -> dict[str, dict[int, float]]:
    """The change of KL in nats a token, by site and number of high tiles."""
    base = sites.uniform_within_budget

    def kl(site: str, tiles: int) -> float:
        counts = {**base, **({site: tiles} if site else {})}
        masks = as_masks({one: sites.top_channels(one, n) for one, n in counts.items()}, sites)
        return problem.costs.share_damage(config, masks, config.rows)

    work = [(site, tiles) for site in base for tiles in _menu(site, config, sites, base)]
    background, found = kl("", 0), dict[str, dict[int, float]]()
    with problem.reporter.stage("damage of each share") as progress:
        for at, (site, tiles) in enumerate(work):
            change = 0.0 if tiles == base[site] else kl(site, tiles) - background
            found.setdefault(site, {})[tiles] = change
            progress(at + 1, len(work))
    return found


def _menu(site: str, config: Config, sites: TileProblem, base: Mapping[str, int]) -> list[int]:
    most, around = sites.channels[site] // config.tile, max(base[site], 1)
    return sorted({base[site], around, *(min(most, round(factor * around)) for factor in config.factors)})


METHOD = SearchMethod(
    paper="this project; HiGHS through scipy.optimize.milp",
    config=Config,
    search=search,
    require_feasible=require_feasible,
    cost=cost,
    default_nbytes=default_nbytes,
    reads_moments=True,
    result_fields=result_fields,
)
