"""The errors that a quantiser leaves in some rows of a weight.

It treats rows apart from one another, so these are the very errors that it leaves in the whole weight; and a few rows
in all formats are quantised in one sweep.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimbit.calibrate.stats import Stats
from trimbit.errors import NumericsError
from trimbit.model.checkpoint.checkpoint import Checkpoint
from trimbit.model.layout import Layout
from trimbit.schema.precision import Precision, Run
from trimbit.transform.weight import WeightCompressor
from trimbit.trial.moments import moments_of


class RowErrors:
    """Errors in the weights of a dense model; the statistics are None if the quantiser reads none."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, stats: Stats | None, method: WeightCompressor) -> None:
        self.checkpoint = checkpoint
        self.layout = layout
        self.stats = stats
        self.method = method

    def of_site(
        self, rows: Mapping[str, Int[Tensor, " some"]], formats: Sequence[Precision]
    ) -> dict[str, Float[Tensor, "formats some cols"]]:
        """What is left in some rows of the weights that read one input, on the device of `rows`.

        Raises:
            NumericsError: if the quantiser fails, naming the weight.
        """
        names = list(rows)
        device, cols = rows[names[0]].device, self.layout.weights[names[0]].cols
        ws = [
            self.checkpoint.tensor(f"{name}.weight")[index.cpu()].to(device, torch.float32)
            for name, index in rows.items()
        ]
        moments = moments_of(self.layout, self.stats, self.layout.weights[names[0]])
        runs = [(Run(count=cols, precision=precision),) for precision in formats]
        try:
            made = self.method.module.quantize_all(
                [w for w in ws for _ in formats], moments.to(device) if moments else None, runs * len(ws),
                self.method.config,
            )  # fmt: skip
        except NumericsError as err:
            raise NumericsError(f"{names[0]}: {err}") from err
        dense = iter(made)
        return {
            name: torch.stack([next(dense).dequantize() - w for _ in formats])
            for name, w in zip(names, ws, strict=True)
        }
