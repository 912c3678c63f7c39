"""The model under masks, by diag H or learnt, with expected errors or with other errors in their place."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from trimbit.pipeline.flow import find_plan
from trimbit.pipeline.job import Job
from trimbit.pipeline.oracle import ModelOracle, problem_of
from trimbit.pipeline.preflight import preflight
from trimbit.pipeline.prepare import Prepared, prepare
from trimbit.schema.plan import Plan
from trimbit.search.problem import Problem
from trimbit.search.two_formats.tiles import TileProblem, as_masks
from trimbit.transform.quant import gptq
from trimbit.trial.masked.expected import ErrorModel, ExpectedLinear
from trimbit.trial.masked.model import MaskedModel

DRAWS = 3  # of errors of all weights
KINDS = ("diag H", "diag H, learnt shares", "learnt")  # the second has as many high channels per site as the third
Masks = Mapping[str, Tensor]  # by site
Errors = Callable[[str, int], Tensor]  # of the weight that is at some place among those that read a site


class Opened(NamedTuple):
    """A job with what its search starts from."""

    job: Job
    prepared: Prepared
    oracle: ModelOracle
    problem: Problem
    sites: TileProblem

    @property
    def masked(self) -> MaskedModel:
        """The model under masks, with errors as the search sees them."""
        return self.oracle.masked(self.job.steps.search)


@contextmanager
def ready(job: Job) -> Iterator[Opened]:
    """Prepare the job; yield the problem at the recipe's own size, with its oracle."""
    nbytes, prepared = preflight(job, None), prepare(job)
    with ModelOracle(job, prepared) as oracle:
        problem = problem_of(job, nbytes, oracle)
        yield Opened(job, prepared, oracle, problem, TileProblem(problem, job.steps.search))


def seen_kl(job: Job, plan: Plan) -> float:
    """KL of a plan's masks on the rows by which plans are chosen, with errors as the search sees them."""
    with ready(job) as own:
        return own.masked.damage(as_masks(own.sites.high(plan), own.sites)).kl


def diag_h(own: Opened) -> tuple[Plan, Masks]:
    """The plan and masks whose high channels are those with the largest diag H."""
    sites = own.sites
    high = {site: sites.top_channels(site, tiles) for site, tiles in sites.uniform_within_budget.items()}
    plan = sites.plan(high, "diag H")
    return plan, as_masks(sites.high(plan), sites)


def masks_of(own: Opened, kind: str) -> tuple[Plan, Masks, dict[str, float]]:
    """The plan and masks of a kind, and for learnt masks the share of high channels that diag H chooses, too."""
    if kind == "diag H":
        return *diag_h(own), {}
    sites = own.sites
    learnt = sites.high(find_plan(own.job, None).plan)
    top = {site: sites.top_channels(site, len(high) // sites.mixed.tile) for site, high in learnt.items()}
    alike = sum(len({*high} & {*top[site]}) for site, high in learnt.items())
    high = learnt if kind == "learnt" else top
    share = round(alike / sum(map(len, learnt.values())), 4)
    return sites.plan(high, kind), as_masks(high, sites), {"alike": share}


def layer_of(masked: MaskedModel, site: str, at: int = 0) -> ExpectedLinear:
    """The layer at a place among those that read a site; it must have expected errors."""
    layer = masked.layers[site][at]
    assert isinstance(layer, ExpectedLinear), "the recipe expects errors"
    return layer


def expected_errors(layer: ExpectedLinear, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The errors expected in a weight: the part along the weight, and the mean squares of the rest."""
    parts: tuple[tuple[ErrorModel, Tensor], ...] = ((layer.low, ~chosen), (layer.high, chosen))
    low, high = (noise.rows @ (noise.cols * own[:, None]).T for noise, own in parts)
    return layer.along(chosen) * layer.weight, low + high


def residuals(layer: ExpectedLinear) -> Tensor:
    """The matrix that maps inputs to residuals."""
    assert layer.inputs.residuals is not None
    found: Tensor = layer.inputs.residuals(torch.eye(layer.weight.shape[1]).to(layer.weight))
    return found.T.float()


def drawn_errors(masked: MaskedModel, masks: Masks, seed: int) -> Errors:
    """Errors drawn as expected: the part along the weight, and a normal sample of the rest."""
    generator = torch.Generator().manual_seed(seed)

    def errors(site: str, at: int) -> Tensor:
        layer = layer_of(masked, site, at)
        along, rest = (own.float() for own in expected_errors(layer, masks[site] > 0))
        drawn = rest.sqrt() * torch.randn(rest.shape, generator=generator)
        return -(along + drawn) @ residuals(layer)

    return errors


def gptq_errors(own: Opened, plan: Plan) -> dict[tuple[str, int], Tensor]:
    """The errors that GPTQ makes on the dense inputs, with channels in the model's order."""
    assert own.prepared.stats is not None
    found = {}
    for site, layers in own.masked.layers.items():
        order = torch.tensor(plan.orders[site])
        moments = own.prepared.stats.moments(site).at(order)
        for at, weight in enumerate(own.job.layout.readers(site)[: len(layers)]):
            w = layer_of(own.masked, site, at).weight.float()
            q = gptq.quantize(w[:, order], moments, plan.weights[weight.name], gptq.Config()).dequantize()
            found[site, at] = q[:, order.argsort()].to(w) - w
    return found


@contextmanager
def with_errors(masked: MaskedModel, errors: Errors) -> Iterator[None]:
    """Put these errors into the weights, in place of expected ones, inside a `with` block."""
    before = []
    for site, layers in masked.layers.items():
        for at in range(len(layers)):
            layer = layer_of(masked, site, at)
            changed: dict[tuple[torch.nn.Module, str], Tensor] = {
                (layer, "weight"): layer.weight + errors(site, at).to(layer.weight)
            }
            for noise in (layer.low, layer.high):
                changed |= {(noise, name): torch.zeros_like(getattr(noise, name)) for name in ("along", "rows")}
            before += [(*key, getattr(*key)) for key in changed]
            for key, value in changed.items():
                setattr(*key, value)
    try:
        yield
    finally:
        for module, name, kept in before:
            setattr(module, name, kept)


def shared_kl(masked: MaskedModel, masks: Masks, draw: Callable[[int], Errors]) -> list[float]:
    """KL, for each of `DRAWS` draws, of errors shared by all tokens, on the rows by which plans are chosen."""
    found = []
    for seed in range(DRAWS):
        with with_errors(masked, draw(seed)):
            found.append(masked.damage(masks).kl)
    return found
