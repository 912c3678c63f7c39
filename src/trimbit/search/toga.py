"""Masks of precision learnt by the loss of the whole model: which channels of every site are high, all others low.

The weights stay as they are, in both formats. A hypernetwork gives a logit for each channel; of a sample of the masks
the loss of a row of text is taken, and its gradient passes through the sample to the network. To the loss comes
weight |log(B / target)|, where B is the mean nominal bits of a code in the sample. In the end the noise is left out,
and the tiles of highest logits fill the budget exactly, as a multiple-choice knapsack.

Only abstract and summaries of the paper could be read: constants are those of DISP-LLM's code, whose masks these
are, or ours.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimbit.cache import save_whole
from trimbit.errors import ArtifactError, NumericsError
from trimbit.plan import Plan
from trimbit.search import knapsack
from trimbit.search.estimators import Estimator, sample
from trimbit.search.hypernetwork import Hypernetwork, Logits
from trimbit.search.mixed import Masking, Sites, as_masks
from trimbit.search.problem import Problem

PAPER = "TOGA-q, arXiv:2606.07819; masks as in DISP-LLM, arXiv:2410.11988"
NEEDS: tuple[str, ...] = ()
READS = "moments"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Config(Masking):
    """The formats, and how masks are learnt."""

    steps: int = Field(default=2000, ge=1)  # paper
    network: Literal["hypernetwork", "logits"] = "hypernetwork"  # paper; logits: a parameter for each channel
    estimator: Estimator = "reinmax"
    temperature: float = Field(default=1.0, gt=0)  # code (microsoft/ReinMax): 1 or more; Gumbel, code (DISP-LLM): 0.4
    offset: float | None = None  # added to logits; code (DISP-LLM): 3, nearly all high; ours, None: by the budget
    prior: float = Field(default=0.0, ge=0)  # ours: times the standard score of log diag H in its site, added to logits
    budget_weight: float = Field(default=6.0, ge=0)  # code (DISP-LLM)
    learning_rate: float = Field(default=1e-3, gt=0)  # code (DISP-LLM)
    weight_decay: float = Field(default=0.05, ge=0)  # code (DISP-LLM)
    save_every: int = Field(default=50, ge=1)  # steps between two stored states


def identity(config: Config) -> dict[str, Any]:
    """What of the configuration decides the masks."""
    return config.model_dump(mode="json", exclude={"save_every", "checkpointing"})


def default_limit(problem: Problem, config: Config) -> int:
    """Bytes with the configured share of every site's channels high."""
    sites = Sites(problem, config)
    return sites.sized(sites.spread(config.share))


def require_feasible(problem: Problem, config: Config) -> None:
    """Refuse a budget outside what the formats reach.

    Raises:
        BudgetError: naming the range.
        RecipeError: if the tile does not divide a site.
    """
    Sites(problem, config).require_feasible()


def search(problem: Problem, config: Config) -> Plan:
    """Learn the masks, and fill the budget by them.

    Raises:
        BudgetError: if the budget is outside what the formats reach.
        NumericsError: if the loss is not finite; says the step. The last stored state stays.
        ArtifactError: if the stored state is that of another search.
    """
    require_feasible(problem, config)
    sites = Sites(problem, config)
    logits = learn(problem, config, sites)
    plan = sites.filled(lambda limit: fill(logits, sites, limit), f"learnt channels in {config.high.name}")
    assert problem.masked is not None
    found = problem.masked(config).damage(as_masks(sites.high(plan), sites))
    notes = (
        f"masks: {config.steps} steps of {config.batch} x {config.length} tokens; "
        f"held out, before the quantiser: KL {found.kl:.4f}, loss {found.nll:.4f} nats",
    )
    return plan.model_copy(update={"found_by": plan.found_by.model_copy(update={"notes": notes})})


def curve(problem: Problem, config: Config) -> list[dict[str, float]]:
    """Of every step that was made: loss in nats a token, nominal bits of the sample, temperature."""
    return list(json.loads(_metadata(_state(problem))["curve"]))


def learn(problem: Problem, config: Config, sites: Sites) -> dict[str, Float[Tensor, " channels"]]:
    """The logits of every site's channels; a run that was broken off goes on from its stored state."""
    assert problem.masked is not None
    masked = problem.masked(config)
    tiles = sites.fitting
    target, start = sites.bits(tiles), _start(config, sites, sites.codes(tiles) / sites.all_codes)
    network: nn.Module = (
        Hypernetwork(sites.channels, problem.seed) if config.network == "hypernetwork" else Logits(sites.channels)
    )
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    log = _resume(_state(problem), problem.key, parameters, optimizer)
    with problem.reporter.stage("masks") as progress:
        for step in range(len(log), config.steps):
            generator = torch.Generator().manual_seed(problem.seed * 1_000_003 + step)
            logits = {site: own + start[site] for site, own in network().items()}
            masks = {site: sample(own, config.estimator, config.temperature, generator) for site, own in logits.items()}
            loss, gradients = masked.gradients({site: mask.detach() for site, mask in masks.items()}, step)
            bits = _bits(masks, sites)
            if not math.isfinite(loss):
                kept = len(log) // config.save_every * config.save_every
                raise NumericsError(
                    f"the loss of step {step + 1} of the masks is {loss}; the state after step {kept} is kept. "
                    "Lower search.learning_rate"
                )
            penalty = config.budget_weight * (bits / target).log().abs()
            torch.autograd.backward([*masks.values(), penalty], [*(gradients[site] for site in masks), None])
            optimizer.step()
            optimizer.zero_grad()
            log.append({"loss": loss, "bits": float(bits.detach()), "temperature": config.temperature})
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                _save(_state(problem), problem.key, parameters, optimizer, log)
            progress(step + 1, config.steps)
    with torch.no_grad():
        return {site: own + start[site] for site, own in network().items()}


def _start(config: Config, sites: Sites, share: float) -> dict[str, Float[Tensor, " channels"]]:
    """What is added to the network's logits: the prior, and an offset, by which this share of the codes is high."""
    energies = {site: torch.tensor(own).clamp(min=1e-12).log() for site, own in sites.energies.items()}
    prior = {site: config.prior * (own - own.mean()) / own.std().clamp(min=1e-6) for site, own in energies.items()}
    if config.offset is not None:
        return {site: own + config.offset for site, own in prior.items()}
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        codes = sum(sites.rows[site] * float(torch.sigmoid(own + middle).sum()) for site, own in prior.items())
        low, high = (middle, high) if codes < share * sites.all_codes else (low, middle)
    return {site: own + low for site, own in prior.items()}


def _bits(masks: Mapping[str, Tensor], sites: Sites) -> Tensor:
    """Mean nominal bits of a code in a sample, with its gradient."""
    low, high = sites.mixed.low.bits, sites.mixed.high.bits
    codes = torch.stack([sites.rows[site] * mask.sum() for site, mask in masks.items()]).sum()
    return low + (high - low) * codes / sites.all_codes


def fill(logits: Mapping[str, Float[Tensor, " channels"]], sites: Sites, limit: int) -> dict[str, tuple[int, ...]]:
    """The high channels of each site: whole tiles whose logits add up to the most within `limit` bytes.

    A logit counts from where every channel is worth its cost, so that the budget is filled. Where the header of what
    would fit is too long, every site has the same share.
    """
    tile, rows = sites.mixed.tile, sites.rows
    ranked = {site: own.double().sort(descending=True, stable=True) for site, own in logits.items()}
    price = max(float(-own.values[-1]) / rows[site] for site, own in ranked.items())
    groups: list[list[tuple[int, float]]] = []
    for site, own in ranked.items():
        worth = (own.values + max(price, 0.0) * rows[site]).view(-1, tile).sum(-1).cumsum(0).tolist()
        groups.append([(sites.site_nbytes(site, count), -value) for count, value in enumerate([0.0, *worth])])
    picked = knapsack.knapsack(groups, limit, knapsack.Config())
    counts = sites.fitting if picked is None else dict(zip(ranked, picked, strict=True))
    return {site: tuple(own.indices[: counts[site] * tile].tolist()) for site, own in ranked.items()}


# --- stored states ---------------------------------------------------------------------------------------------------


def _state(problem: Problem) -> Path:
    assert problem.journal is not None, "the search keeps its state"
    return problem.journal.with_suffix(".safetensors")


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def _save(
    path: Path, key: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer,
    log: list[dict[str, float]],
) -> None:  # fmt: skip
    """Parameters, the optimiser's moments and the curve so far; the file appears whole."""
    tensors = {name: p.detach() for name, p in parameters.items()}
    tensors |= {f"{name}.{part}": optimizer.state[p][part] for name, p in parameters.items() for part in MOMENTS}
    metadata = {"belongs": key, "curve": json.dumps(log)}
    save_whole(path, lambda beside: save_file(tensors, beside, metadata))


def _resume(
    path: Path, key: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[dict[str, float]]:
    """Take up a stored state; returns its curve."""
    if not path.exists():
        return []
    metadata = _metadata(path)
    with safe_open(path, framework="pt") as file:
        want = {*parameters, *(f"{name}.{part}" for name in parameters for part in MOMENTS)}
        if metadata.get("belongs") != key or set(file.keys()) != want:
            raise ArtifactError(f"{path} is the stored state of another search; remove it and run again")
        for name, p in parameters.items():
            with torch.no_grad():
                p.copy_(file.get_tensor(name))
            optimizer.state[p] = {part: file.get_tensor(f"{name}.{part}") for part in MOMENTS}
    return list(json.loads(metadata["curve"]))
