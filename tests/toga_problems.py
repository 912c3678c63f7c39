"""Problems of two formats with invented worths: no model is run."""

import importlib
from dataclasses import dataclass, field, replace

import torch

from problems import LAYOUT, Figures, measurements, problem
from trimbit.model.forward.logits import Divergence
from trimbit.schema.activations import ActInt
from trimbit.schema.precision import parse_precision
from trimbit.schema.space import Space
from trimbit.search.methods import toga
from trimbit.search.two_formats.tiles import TileProblem

SPACE = Space(formats=(), embedding_formats=())


SMALL = {"low": parse_precision("binaryg32"), "high": parse_precision("int4g32"), "tile": 16, "share": 0.25}


CONFIG = toga.Config(
    **SMALL, steps=60, batch=1, length=16, learning_rate=0.05, weight_decay=0.0, network="logits", save_every=7
)


ACTS = {"low_acts": ActInt(bits=3, group=32, clip=0.9), "high_acts": ActInt(bits=8, group=32)}


def second_moments():
    generator = torch.Generator().manual_seed(5)
    sites = dict.fromkeys(w.site for w in LAYOUT.weights.values() if LAYOUT.readers(w.site))
    return {site: torch.rand(LAYOUT.readers(site)[0].cols, generator=generator).tolist() for site in sites}


@dataclass
class Invented:
    """Loss: the sum of what each low channel is worth, all the same but for some that matter."""

    worth: dict[str, torch.Tensor]
    fails_at: int | None = None
    steps: list[int] = field(default_factory=list)
    device = torch.device("cpu")

    def gradients(self, masks, step, generator):
        self.steps.append(step)
        torch.rand(3, generator=generator)  # as if for noise
        loss = sum(float((self.worth[site] * (1 - mask)).sum()) for site, mask in masks.items())
        return loss, {site: -self.worth[site] for site in masks}

    def damage(self, masks, rows=None):
        return Divergence(kl=self.gradients(masks, -1, torch.Generator())[0], nll=1.0)


def worths(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        site: torch.where(torch.rand(len(own), generator=generator) < 0.2, 0.5, 0.001) * len(LAYOUT.readers(site))
        for site, own in second_moments().items()
    }


def made(tmp_path, config=CONFIG, limit=None, **fields):
    masked = fields.pop("masked", None) or Invented(worths())
    found = problem(
        limit or 10**9, space=SPACE, measurements=measurements(), figures=Figures(second_moments=second_moments),
        masks=masked, state=tmp_path, **fields,
    )  # fmt: skip
    module = toga if type(config) is toga.Config else importlib.import_module(type(config).__module__)
    return found if limit else replace(found, budget_nbytes=module.default_nbytes(found, config))


def high_of(plan, sites):
    """The high channels that a plan stores, by site."""
    return {site: set(own) for site, own in sites.high(plan).items()}


def kept(plan, task, config):
    """What the high channels of a plan are worth."""
    worth, high = worths(), high_of(plan, TileProblem(task, config))
    return sum(float(worth[site][sorted(own)].sum()) for site, own in high.items())
