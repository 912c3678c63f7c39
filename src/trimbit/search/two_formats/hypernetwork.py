"""A network that gives the logits of all masks at once (DISP-LLM, arXiv:2410.11988): one step of a GRU for each mask.

Its inputs are fixed random numbers. The GRU passes over the masks in the order of the model, in both directions, so
that what is learnt for one mask changes those around it.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

INPUTS, HIDDEN = 32, 64  # code (gaosh/DISP-LLM); HIDDEN is for each direction


class Hypernetwork(nn.Module):
    """Logits by site, [channels of the site] each."""

    def __init__(self, channels: Mapping[str, int], seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("inputs", torch.randn(len(channels), INPUTS))
            self.gru = nn.GRU(INPUTS, HIDDEN, bidirectional=True)
            self.norm = nn.LayerNorm(2 * HIDDEN)
            self.heads = nn.ModuleList(nn.Linear(2 * HIDDEN, count, bias=False) for count in channels.values())
        self.sites = tuple(channels)

    def forward(self) -> dict[str, Float[Tensor, " channels"]]:
        """The logits of each mask."""
        states, _ = self.gru(self.inputs)
        features = functional.gelu(self.norm(states))
        return {site: head(own) for site, head, own in zip(self.sites, self.heads, features, strict=True)}


class Logits(nn.Module):
    """The alternative to the hypernetwork: a parameter for each channel."""

    def __init__(self, channels: Mapping[str, int]) -> None:
        super().__init__()
        self.sites = tuple(channels)
        self.own = nn.ParameterList(nn.Parameter(torch.zeros(count)) for count in channels.values())

    def forward(self) -> dict[str, Float[Tensor, " channels"]]:
        """The logits of each mask."""
        return dict(zip(self.sites, self.own, strict=True))
