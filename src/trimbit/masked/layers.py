"""The layers of a masked model, made from each weight and its two formats."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimbit.apply import Compressed
from trimbit.candidates import CandidateWeights
from trimbit.errors import NumericsError
from trimbit.kernels.acts import take_channels
from trimbit.masked.expected import ExpectedLinear, Squares, squares
from trimbit.masked.inputs import Inputs, MaskedLinear
from trimbit.masked.rounded import RoundedLinear
from trimbit.model.layout import Weight
from trimbit.precision import BFloat16, Precision
from trimbit.quant import gptq
from trimbit.search.mixed import Masking


class Layers:
    """Makes layers; the candidates' columns are in `orders`, by site."""

    def __init__(
        self, candidates: CandidateWeights, config: Masking, orders: Mapping[str, Int[Tensor, " cols"]],
        sweep: gptq.Config,
    ) -> None:  # fmt: skip
        self.candidates = candidates
        self.config = config
        self.orders = orders
        self.sweep = sweep  # that errors are expected of
        self.left: dict[str, Tensor] = {}  # by site, in its order

    def inputs(self, site: str, compute: torch.dtype) -> Inputs:
        """What the layers of a site share."""
        return Inputs((self.config.low_acts, self.config.high_acts), self.orders[site], compute)

    def linear(self, weight: Weight, inputs: Inputs, bias: Tensor | None) -> MaskedLinear:
        """The layer of a weight.

        Raises:
            NumericsError: if errors are to be as expected, and the damped H of the inputs is not positive definite.
        """
        low, high = (self.candidates.compressed(weight, each) for each in (self.config.low, self.config.high))
        if self.config.versions != "expected":
            return RoundedLinear(low.packed, high.packed, inputs, bias, dense=self.config.dense)
        dense, left = self.candidates.checkpoint.tensor(f"{weight.name}.weight"), self._left(weight)
        ordered = take_channels(dense.float(), self.orders[weight.site])

        def found(made: Compressed, precision: Precision) -> Squares:
            errors = ordered - made.dense(torch.float32)
            return squares(errors * left, None if isinstance(precision, BFloat16) else precision.group)

        return ExpectedLinear(dense, found(low, self.config.low), found(high, self.config.high), inputs, bias)

    def _left(self, weight: Weight) -> Float[Tensor, " cols"]:
        """How much of an error GPTQ leaves, in the site's order, if the recipe's share of largest diag H is high."""
        if weight.site not in self.left:
            moments = self.candidates.moments(weight)
            assert moments is not None
            by_energy = moments.h.diagonal().argsort(stable=True)
            high = round(self.config.share * weight.cols)
            try:
                found = gptq.uncompensated(moments.at(by_energy).h, (weight.cols - high, high), self.sweep)
            except NumericsError as err:
                raise NumericsError(f"{weight.name}: {err}") from err
            self.left[weight.site] = found[by_energy.argsort()]
        return self.left[weight.site]
