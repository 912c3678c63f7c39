"""The errors that a quantiser is expected to leave in a weight, known without quantising it.

GPTQ rounds every column once and lets those swept later make up for it. So the squared error of an element is about
that of rounding it to nearest, and it is felt on what the later columns do not predict of its input, R x
(`transform.quant.gptq.residuals`). Rounding to nearest alone is felt on the input as it is.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimbit.calibrate.moments import Moments
from trimbit.calibrate.stats import Stats
from trimbit.model.checkpoint.checkpoint import Checkpoint
from trimbit.model.layout import Layout
from trimbit.schema.precision import Precision, Run
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.quant.grid import fit_grid
from trimbit.trial.moments import moments_of


class ExpectedErrors:
    """Errors of every weight of a model in every format."""

    def __init__(
        self, checkpoint: Checkpoint, layout: Layout, stats: Stats | None, config: gptq.Config | rtn.Config
    ) -> None:
        """`config` is the quantiser's; GPTQ needs the statistics."""
        self.checkpoint = checkpoint
        self.layout = layout
        self.stats = stats
        self.config = config
        self._residual: tuple[str, Tensor] | None = None  # of the last site

    def of_rows(
        self, name: str, rows: Int[Tensor, " some"], precision: Precision, felt: Float[Tensor, "cols places"]
    ) -> Float[Tensor, "some places"]:
        """The expected squared error of some rows' output, where that of each column counts as `felt` in each place."""
        w, weighting = self.checkpoint.tensor(f"{name}.weight")[rows.cpu()].to(felt.device, torch.float32), None
        if isinstance(self.config, gptq.Config) and self.config.weighted_scales:
            weighting = self._moments(name).h.diagonal().clamp(min=gptq.LEAST_WEIGHT).to(felt.device)
        grid = fit_grid(w, (Run(count=w.shape[1], precision=precision),), self.config.scales, weighting)
        return rtn.rounding_errors(w, grid).square_() @ felt

    def felt(self, name: str, h: Float[Tensor, "cols cols"]) -> Float[Tensor, " cols"]:
        """The mean square of what an error in each column is felt on, where the inputs' second moment is `h`."""
        if not isinstance(self.config, gptq.Config):
            return h.diagonal()
        site = self.layout.weights[name].site
        if self._residual is None or self._residual[0] != site:
            moments = self._moments(name)
            self._residual = site, gptq.residuals(moments.h.to(h.device), [len(moments.h)], self.config).to(h.dtype)
        residual = self._residual[1]
        found: Tensor = torch.linalg.vecdot(residual @ h, residual)
        return found

    def _moments(self, name: str) -> Moments:
        found = moments_of(self.layout, self.stats, self.layout.weights[name])
        assert found is not None, "GPTQ needs moments"
        return found
