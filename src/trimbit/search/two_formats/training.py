"""The network of the masks, and the gradients of its training steps."""

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from trimbit.search.problem import Problem
from trimbit.search.two_formats.config import MaskTraining
from trimbit.search.two_formats.estimators import Estimator, sample
from trimbit.search.two_formats.hypernetwork import Hypernetwork, Logits
from trimbit.search.two_formats.tiles import TileProblem


class Config(MaskTraining):
    """The formats, and how masks are learnt."""

    network: Literal["hypernetwork", "logits"] = "hypernetwork"  # paper; logits: a parameter for each channel
    estimator: Estimator = "reinmax"
    temperature: float | None = Field(default=None, gt=0)  # None: code, ReinMax 1 (microsoft), Gumbel 0.4 (DISP-LLM)
    budget: Literal["penalty", "projection"] = "penalty"  # paper; ours, after RCO, arXiv:2605.00649
    whole_tiles: bool = False  # ours: the channels of a tile are drawn together
    offset: float | None = None  # added to logits; code (DISP-LLM): 3, nearly all high; ours, None: from the budget
    prior: float = Field(default=0.0, ge=0)  # ours: factor on the z-score of log diag H in its site, added to logits
    budget_weight: float | None = Field(default=None, ge=0)  # of the penalty; None: paper (DISP-LLM), 6
    optimizer: Literal["adamw", "sgd"] = "adamw"  # code (DISP-LLM); ours: sgd on the gradient scaled to length 1
    learning_rate: float = Field(default=1e-3, gt=0, lt=1e3)  # code (DISP-LLM)
    schedule: Literal["constant", "linear"] = "constant"  # code (DISP-LLM); ours: linear decay to 0
    weight_decay: float | None = Field(default=None, ge=0)  # of adamw; None: code (DISP-LLM), 0.05
    save_every: int = Field(default=50, ge=1)  # steps between two stored states

    @model_validator(mode="after")
    def _check_temperature(self) -> "Config":
        if self.temperature is not None and (
            self.temperature < 1 if self.estimator == "reinmax" else self.temperature > 1
        ):
            side = "at least" if self.estimator == "reinmax" else "at most"
            raise ValueError(f"a temperature of {self.temperature:g}, but {self.estimator} wants {side} 1")
        return self

    @model_validator(mode="after")
    def _check_what_goes_together(self) -> "Config":
        if self.budget == "projection" and self.offset is not None:
            raise ValueError("projection moves all logits to the budget: `offset` needs budget=penalty")
        if self.budget == "projection" and self.budget_weight is not None:
            raise ValueError("projection has no weight: `budget_weight` needs budget=penalty")
        if self.optimizer == "sgd" and self.weight_decay is not None:
            raise ValueError("sgd does not decay weights: `weight_decay` needs optimizer=adamw")
        if self.optimizer == "sgd" and self.budget == "penalty":
            raise ValueError("sgd normalises the gradient, penalty included: it needs budget=projection")
        return self

    @property
    def resolved_temperature(self) -> float:
        """The temperature."""
        return self.temperature if self.temperature is not None else {"reinmax": 1.0, "gumbel": 0.4}[self.estimator]

    @property
    def penalty_weight(self) -> float:
        """The weight of the budget's penalty, relative to a loss in nats a token."""
        return 6.0 if self.budget_weight is None else self.budget_weight

    @property
    def resolved_weight_decay(self) -> float:
        """The weight decay of AdamW."""
        return 0.05 if self.weight_decay is None else self.weight_decay


class Training:
    """The network of the masks, and the gradients of its training steps."""

    def __init__(self, problem: Problem, config: Config, sites: TileProblem) -> None:
        self.masked, self.config, self.sites, self.seed = problem.costs.masked(config), config, sites, problem.seed
        self.target = sites.codes(sites.uniform_within_budget)
        network = (
            Hypernetwork(sites.channels, self.seed) if config.network == "hypernetwork" else Logits(sites.channels)
        )
        self.network: nn.Module = network.to(self.masked.device)
        self.start = {site: own.to(self.masked.device) for site, own in _start(config, sites, self.target).items()}

    def logits(self) -> dict[str, Float[Tensor, " channels"]]:
        """The logits of every site's channels, before they are shifted to the budget."""
        return {site: own + self.start[site] for site, own in self.network().items()}

    def backward(self, step: int) -> tuple[float, float, Iterable[Tensor]]:
        """A step's loss in nats a token, the number of high codes in its sample, and the gradients of its masks.

        The gradients of the network's parameters are added to their `grad`.
        """
        config, sites = self.config, self.sites
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        logits = self.logits()
        uniform = {site: torch.rand(count, generator=generator) for site, count in sites.channels.items()}
        if config.whole_tiles:
            first = {site: _tiles(own, config.tile) for site, own in logits.items()}
            logits = {site: _shared(own, first[site]) for site, own in logits.items()}
            uniform = {site: own[first[site].cpu()] for site, own in uniform.items()}
        if config.budget == "projection":
            logits = _projected(logits, sites, self.target)
        drawn = torch.cat([uniform[site] for site in logits])
        z = sample(torch.cat(list(logits.values())), config.estimator, config.resolved_temperature, drawn)
        masks = dict(zip(logits, z.split([len(own) for own in logits.values()]), strict=True))
        loss, gradients = self.masked.gradients({site: mask.detach() for site, mask in masks.items()}, step, generator)
        codes = torch.stack([sites.rows[site] * mask.sum() for site, mask in masks.items()]).sum()
        missed = ((codes + 1) / (self.target + 1)).log().abs()  # has a gradient even if no channel is high
        penalties = [config.penalty_weight * missed] if config.budget == "penalty" else []
        of_z = torch.cat([gradients[site] for site in masks])
        torch.autograd.backward([z, *penalties], [of_z, *(None for _ in penalties)])
        return loss, codes.item(), [of_z]


def _tiles(logits: Float[Tensor, " n"], size: int) -> Int[Tensor, " n"]:
    """The first channel of each channel's tile; a site's channels are cut into tiles by falling logit."""
    order = logits.detach().argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter(0, order, order[::size].repeat_interleave(size))


def _shared(logits: Float[Tensor, " n"], tiles: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The mean logit of each channel's tile; gradients pass to it and to the channel's logit, which sets the tile."""
    means = torch.zeros_like(logits).scatter_reduce(0, tiles, logits, "mean", include_self=False)[tiles]
    return means + (logits - logits.detach())


def _start(config: Config, sites: TileProblem, target: int) -> dict[str, Float[Tensor, " channels"]]:
    """Added to the network's logits: the prior and an offset, by default that with `target` high codes in the mean."""
    second_moments = {site: torch.tensor(own).clamp(min=1e-12).log() for site, own in sites.second_moments.items()}
    prior = {
        site: config.prior * (own - own.mean()) / own.std().clamp(min=1e-6) for site, own in second_moments.items()
    }
    if config.offset is not None:
        return {site: own + config.offset for site, own in prior.items()}
    return _projected(prior, sites, target)


def _projected(
    logits: dict[str, Float[Tensor, " channels"]], sites: TileProblem, target: int
) -> dict[str, Float[Tensor, " channels"]]:
    """The logits, all shifted by the number at which `target` codes are high in the mean, with its gradient."""
    flat = torch.cat(list(logits.values()))
    rows = torch.cat([flat.new_full((len(own),), sites.rows[site]) for site, own in logits.items()])
    with torch.no_grad():
        own, weights = flat.cpu(), rows.cpu()  # on a GPU, each iteration would wait for it
        low, high = -40.0 - float(own.max()), 40.0 - float(own.min())
        for _ in range(60):
            middle = (low + high) / 2
            codes = float((weights * torch.sigmoid(own + middle)).sum(dtype=torch.float64))
            low, high = (middle, high) if codes < target else (low, middle)
        p = torch.sigmoid(flat + low)
        slope = rows * p * (1 - p)  # of the high codes with respect to each logit
        slope /= slope.sum().clamp(min=1e-12)
    mean = (slope * flat).sum()
    moved = flat + low - (mean - mean.detach())
    return dict(zip(logits, moved.split([len(own) for own in logits.values()]), strict=True))
