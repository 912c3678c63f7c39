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
from trimbit.model.forward.stream import CPU
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
        w = self.checkpoint.tensor(f"{name}.weight")[rows.cpu()].to(felt.device, torch.float32)
        return self._rounding(name, w, precision).square_() @ felt

    def of_columns(
        self, name: str, rows: Int[Tensor, " some"], precision: Precision, weights: Float[Tensor, " some"]
    ) -> Float[Tensor, " cols"]:
        """The expected squared error of each column, summed over some rows by their weights; not yet felt."""
        w = self.checkpoint.tensor(f"{name}.weight")[rows.cpu()].to(weights.device, torch.float32)
        return weights @ self._rounding(name, w, precision).square_()

    def site_state(
        self, site: str, precision: Precision, device: torch.device = CPU
    ) -> dict[str, Float[Tensor, "rows cols"]]:
        """The weights that read a site with such errors: those of rounding to nearest, each felt as it would be."""
        found = {}
        for weight in self.layout.readers(site):
            w = self.checkpoint.tensor(f"{weight.name}.weight").to(device, torch.float32)
            errors = self._rounding(weight.name, w, precision)
            if isinstance(self.config, gptq.Config):
                errors = errors @ self._felt_on(weight.name, self.config, errors)
            found[f"{weight.name}.weight"] = w + errors
        return found

    def _rounding(self, name: str, w: Float[Tensor, "rows cols"], precision: Precision) -> Float[Tensor, "rows cols"]:
        """The errors of rounding to nearest on the grid that the quantiser takes."""
        weighting = None
        if isinstance(self.config, gptq.Config) and self.config.weighted_scales:
            weighting = self._moments(name).h.diagonal().clamp(min=gptq.LEAST_WEIGHT).to(w.device)
        grid = fit_grid(w, (Run(count=w.shape[1], precision=precision),), self.config.scales, weighting)
        return rtn.rounding_errors(w, grid)

    def felt(self, name: str, h: Float[Tensor, "cols cols"]) -> Float[Tensor, " cols"]:
        """The mean square of the input that an error in each column acts on, with `h` the inputs' second moment."""
        if not isinstance(self.config, gptq.Config):
            return h.diagonal()
        residual = self._felt_on(name, self.config, h)
        found: Tensor = torch.linalg.vecdot(residual @ h, residual)
        return found

    def _felt_on(self, name: str, config: gptq.Config, like: Tensor) -> Float[Tensor, "cols cols"]:
        """R, where R x is the part of the input that errors act on under GPTQ."""
        site = self.layout.weights[name].site
        if self._residual is None or self._residual[0] != site:
            own = self._moments(name).h.to(like.device)
            try:
                self._residual = site, gptq.residuals(own, [len(own)], config).to(like.dtype)
            except NumericsError as err:
                raise NumericsError(f"{name}: {err}") from err
        return self._residual[1]

    def _moments(self, name: str) -> Moments:
        weight = self.layout.weights[name]
        if self._last is None or self._last[0] != weight.site:
            found = moments_of(self.layout, self.stats, weight)
            assert found is not None, "GPTQ needs moments"
            self._last = weight.site, found
        return self._last[1]
