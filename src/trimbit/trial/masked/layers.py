"""The layers of a masked model, made from each weight and its two formats."""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from trimbit.calibrate.inverse import damped
from trimbit.errors import NumericsError
from trimbit.kernels.acts import take_channels
from trimbit.model.layout import Weight
from trimbit.schema.precision import BFloat16, Precision
from trimbit.search.two_formats.config import MaskedSearch
from trimbit.transform.quant import gptq
from trimbit.transform.weight import Compressed
from trimbit.trial.candidates import CandidateWeights
from trimbit.trial.masked.expected import ErrorModel, ExpectedLinear
from trimbit.trial.masked.inputs import Inputs, MaskedLinear
from trimbit.trial.masked.residuals import Residuals
from trimbit.trial.masked.rounded import RoundedLinear


class Layers:
    """Makes layers; the candidates' columns are in `orders`, by site."""

    def __init__(
        self, candidates: CandidateWeights, config: MaskedSearch, orders: Mapping[str, Int[Tensor, " cols"]],
        sweep: gptq.Config,
    ) -> None:  # fmt: skip
        self.candidates = candidates
        self.config = config
        self.orders = orders
        self.sweep = sweep  # GPTQ's configuration for expected errors

    def inputs(self, weight: Weight, compute: torch.dtype) -> Inputs:
        """The inputs that the layers of a weight's site share.

        Raises:
            NumericsError: if `error_model` is `expected` and the damped H of the inputs is not positive definite.
        """
        residuals = self._residuals(weight, compute) if self.config.error_model == "expected" else None
        return Inputs((self.config.low_acts, self.config.high_acts), self.orders[weight.site], compute, residuals)

    def linear(self, weight: Weight, inputs: Inputs, bias: Tensor | None) -> MaskedLinear:
        """The layer of a weight."""
        low, high = (self.candidates.compressed(weight, each) for each in (self.config.low, self.config.high))
        if self.config.error_model != "expected":
            return RoundedLinear(low.packed, high.packed, inputs, bias, dense=self.config.dense)
        dense = self.candidates.checkpoint.tensor(f"{weight.name}.weight")
        ordered = take_channels(dense.float(), self.orders[weight.site])

        def noise(made: Compressed, precision: Precision) -> ErrorModel:
            group = None if isinstance(precision, BFloat16) else precision.group
            return ErrorModel(ordered - made.dense(torch.float32), ordered, group, inputs)

        own = noise(low, self.config.low), noise(high, self.config.high)
        return ExpectedLinear(dense, *own, inputs, bias)

    def _residuals(self, weight: Weight, compute: torch.dtype) -> Residuals:
        """The residuals of GPTQ's sweep when the channels of largest diag H are high, by the recipe's share."""
        assert self.candidates.stats is not None
        moments = self.candidates.stats.moments(weight.site)
        order = moments.h.diagonal().argsort(stable=True)
        back, high = order.argsort(), round(self.config.share * weight.cols)
        try:
            exact = gptq.residuals(moments.at(order).h, (weight.cols - high, high), self.sweep)[back][:, back]
        except NumericsError as err:
            raise NumericsError(f"{weight.name}: {err}") from err
        return Residuals(exact.double(), damped(moments.h.double(), self.sweep.damping), self.config.rank, compute)
