"""The whole model in memory, in the dtype of its matrix products; weights are replaced in place.

Used where the model runs many times, as when damage is measured or text is sampled.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trimbit.model.checkpoint.open import materialize
from trimbit.model.forward.stream import CPU, BlockStream, build_skeleton


class InMemoryModel:
    """A causal LM whose parameters can be replaced; all weights that write to the residual stream have a bias."""

    def __init__(self, stream: BlockStream, device: torch.device = CPU) -> None:
        self.layout = stream.layout
        self.compute = stream.compute
        self.device = device
        self.model = build_skeleton(stream.checkpoint.config, stream.compute)
        self.blocks: nn.ModuleList = self.model.get_decoder().layers
        for index, block in enumerate(self.blocks):
            materialize(block, stream.checkpoint, f"{self.layout.family.blocks}.{index}.", self.compute)
        for name in (
            self.layout.family.embed,
            self.layout.family.final_norm,
            *(() if self.layout.tied else (self.layout.family.head,)),
        ):
            materialize(self.model.get_submodule(name), stream.checkpoint, f"{name}.", self.compute)
        if self.layout.tied:
            self.model.tie_weights()
        stream.go_online(self.model)
        for unit in self.layout.units.values():
            if unit.out_weight is not None:
                linear = self.model.get_submodule(unit.out_weight)
                if linear.bias is None:
                    linear.bias = nn.Parameter(
                        torch.zeros(linear.out_features, dtype=self.compute), requires_grad=False
                    )
        nn.Module.to(self.model, device)

    def install(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors, by parameter name, into the model."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.model.get_parameter(name).copy_(tensor)

    def current(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Copies of the named parameters."""
        return {name: self.model.get_parameter(name).detach().clone() for name in names}
