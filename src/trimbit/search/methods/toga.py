"""Precision masks learnt from the loss of the whole model: some channels of every site are high, all others low.

The weights are frozen. A hypernetwork gives a logit for each channel; masks are sampled from the logits, and the
gradient of the loss on a row of text passes through the sample to the network. The budget is held in one of two ways.
As a penalty, weight |log(h / target)| is added to the loss, where h is the share of high codes in the sample. By
projection, all logits are shifted by one number so that h is the target in the mean; the gradient includes the shift,
so that what one channel gains others lose. At the end there is no noise, and the tiles of highest logits fill the
budget. With `whole_tiles` a sample consists of whole tiles, too: the channels of a site are cut into tiles by falling
logit, and all channels of a tile share its mean logit. Without it, a site that wants less than a tile never learns
whether one tile is better than none.

Only the abstract and summaries of the paper could be read: constants are from DISP-LLM's code, which has the same
masks, or ours.
"""

import json
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimbit.jobs.state import load_state, require_finite, save_state
from trimbit.schema.found import Found
from trimbit.search.effort import Effort
from trimbit.search.problem import Problem, SearchMethod
from trimbit.search.two_formats.tiles import TileProblem, default_nbytes, require_feasible
from trimbit.search.two_formats.training import Config, Training

ADVICE = "Lower search.learning_rate to retrain from scratch"


def result_fields(config: Config) -> dict[str, Any]:
    """The fields of the configuration that decide the masks; CUDA graphs do, too, and are part of the key's device."""
    return config.model_dump(mode="json", exclude={"save_every", "checkpointing", "dense"})


def cost(problem: Problem, config: Config) -> Effort:
    """Gradients of the masks, a batch of rows a step."""
    return Effort(mask_steps=config.steps, formats=(config.low, config.high))


def search(problem: Problem, config: Config) -> Found:
    """Learn the masks, and fill the budget by them.

    Raises:
        BudgetError: if the budget is outside the range of the formats.
        NumericsError: if the loss is not finite, naming the step. The last stored state stays.
    """
    require_feasible(problem, config)
    sites = TileProblem(problem, config)
    logits, curve = learn(problem, config, sites)
    return Found(plan=sites.fill_by_logits(logits, f"learnt channels in {config.high.name}"), curve=tuple(curve))


Logits = dict[str, Float[Tensor, " channels"]]
Curve = list[dict[str, float]]


def learn(problem: Problem, config: Config, sites: TileProblem) -> tuple[Logits, Curve]:
    """The logits of every site's channels, and for every step the loss in nats a token, the bits and the temperature.

    An interrupted run goes on from its stored state.
    """
    assert problem.state is not None, "the search keeps its state"
    path = problem.state / "masks.safetensors"
    training = Training(problem, config, sites)
    parameters = dict(training.network.named_parameters())
    optimizer = _optimizer(parameters.values(), config)
    metadata = load_state(path, parameters, optimizer)
    curve: Curve = json.loads(metadata["curve"]) if metadata else []
    kept = len(curve)
    with problem.reporter.stage("masks") as progress:
        for step in range(len(curve), config.steps):
            loss, codes, gradients = training.backward(step)
            found = {"sample": [torch.tensor(codes)], "loss": [torch.tensor(loss)], "gradient": gradients}
            require_finite("the masks", step + 1, kept, ADVICE, **found)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - step / config.steps if config.schedule == "linear" else 1)
            if config.optimizer == "sgd":
                _normalize(parameters.values())
            optimizer.step()
            optimizer.zero_grad()
            require_finite("the masks", step + 1, kept, ADVICE, parameter=parameters.values())
            curve.append({"loss": loss, "bits": sites.bits(int(codes)), "temperature": config.resolved_temperature})
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                save_state(path, parameters, optimizer, {"curve": json.dumps(curve)})
                kept = step + 1
            progress(step + 1, config.steps)
    with torch.no_grad():
        return {site: own.cpu() for site, own in training.logits().items()}, curve


def _optimizer(parameters: Iterable[Tensor], config: Config) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.resolved_weight_decay)


def _normalize(parameters: Iterable[Tensor]) -> None:
    """Scale the joint gradient of all parameters to length 1: no step counts more than another."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    length = torch.nn.utils.get_total_norm(gradients).clamp(min=torch.finfo(torch.float32).tiny)
    for gradient in gradients:
        gradient /= length


METHOD = SearchMethod(
    paper="TOGA-q, arXiv:2606.07819; masks as in DISP-LLM, arXiv:2410.11988",
    config=Config,
    search=search,
    require_feasible=require_feasible,
    cost=cost,
    default_nbytes=default_nbytes,
    reads_moments=True,
    draws=True,
    result_fields=result_fields,
)
