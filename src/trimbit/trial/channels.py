"""Figures of a model for searches over input channels of weights: second moments, saliences, rounding errors."""

from dataclasses import dataclass

import torch

from trimbit.calibrate.inverse import damped_inverse
from trimbit.calibrate.stats import Stats
from trimbit.model.checkpoint.checkpoint import Checkpoint
from trimbit.model.layout import Layout
from trimbit.schema.precision import Run
from trimbit.transform.quant import rtn

DAMPING = 0.01  # code (Aaronhuang-778/SliM-LLM): added to diag H, as a share of its mean


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelFigures:
    """Figures of a model's channels, from the dense model's statistics."""

    checkpoint: Checkpoint
    layout: Layout
    stats: Stats

    def second_moments(self) -> dict[str, list[float]]:
        """Diag H of the inputs of each site of the blocks."""
        sites = dict.fromkeys(w.site for w in self.layout.weights.values() if self.layout.readers(w.site))
        return {site: self.stats.moments(site).h.diagonal().tolist() for site in sites}

    def salience(self, name: str) -> list[float]:
        """For each input channel of a weight, the sum of w^2 / [H^-1]_jj^2 over its rows."""
        h = self.stats.moments(self.layout.weights[name].site).h
        w = self.checkpoint.tensor(f"{name}.weight").double()
        inverse, d = damped_inverse(h, DAMPING)
        diagonal = inverse.diagonal().double() * d.double().square()
        return (w.square().sum(0) / diagonal.square()).tolist()

    def rounding_error(self, name: str, runs: tuple[Run, ...]) -> float:
        """E |(W - Q) x|^2 of a weight that is rounded to nearest in these runs."""
        h = self.stats.moments(self.layout.weights[name].site).h
        w = self.checkpoint.tensor(f"{name}.weight").float()
        off = w - rtn.quantize(w, None, runs, rtn.Config(scales="mse")).dequantize()
        return float(torch.linalg.vecdot(off @ h, off).sum())
