"""The errors that a quantiser is expected to leave in a weight, found without quantising it.

GPTQ rounds every column once, and the columns swept later compensate for the error. So the squared error of an element
is about that of rounding it to nearest, but it acts only on the part of its input that the later columns do not
predict, R x (`transform.quant.gptq.residuals`). With rounding to nearest alone it acts on the whole input.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimbit.calibrate.moments import Moments
from trimbit.calibrate.stats import Stats
from trimbit.errors import NumericsError
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
        self._last: tuple[str, Moments] | None = None  # of the last site
        self._residual: tuple[str, Tensor] | None = None

    def of_rows(
        self, name: str, rows: Int[Tensor, " some"], precision: Precision, felt: Float[Tensor, "cols places"]
    ) -> Float[Tensor, "some places"]:
        """The expected squared error of some rows' output; `felt` weights each column's squared error, by place."""
        w, weighting = self.checkpoint.tensor(f"{name}.weight")[rows.cpu()].to(felt.device, torch.float32), None
        if isinstance(self.config, gptq.Config) and self.config.weighted_scales:
            weighting = self._moments(name).h.diagonal().clamp(min=gptq.LEAST_WEIGHT).to(felt.device)
        grid = fit_grid(w, (Run(count=w.shape[1], precision=precision),), self.config.scales, weighting)
        return rtn.rounding_errors(w, grid).square_() @ felt

    def felt(self, name: str, h: Float[Tensor, "cols cols"]) -> Float[Tensor, " cols"]:
        """The mean square of the input that an error in each column acts on, with `h` the inputs' second moment."""
        if not isinstance(self.config, gptq.Config):
            return h.diagonal()
        site = self.layout.weights[name].site
        if self._residual is None or self._residual[0] != site:
            own = self._moments(name).h.to(h.device)
            try:
                self._residual = site, gptq.residuals(own, [len(own)], self.config).to(h.dtype)
            except NumericsError as err:
                raise NumericsError(f"{name}: {err}") from err
        residual = self._residual[1]
        found: Tensor = torch.linalg.vecdot(residual @ h, residual)
        return found

    def _moments(self, name: str) -> Moments:
        weight = self.layout.weights[name]
        if self._last is None or self._last[0] != weight.site:
            found = moments_of(self.layout, self.stats, weight)
            assert found is not None, "GPTQ needs moments"
            self._last = weight.site, found
        return self._last[1]
