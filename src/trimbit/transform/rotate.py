"""QuaRot (arXiv:2404.00456): a model with channels rotated by Hadamard matrices computes the same, without outliers.

Three bases change. The residual stream h becomes h Q with Q = diag(signs) H / sqrt(hidden) and random signs: Q is
folded into the weights that read and write h, and the gains of the norms into the weights after them. Each head's
values become v H, folded into V and O. The inputs of the last feed-forward projection become x H, folded into that
weight on one side only: the inputs are transformed while the model runs. Ours: the embedding, which may be the head's,
and the final norm stay as they are; the embedding's output is rotated while the model runs, and the last hidden states
are rotated back.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimbit.errors import LayoutError, PlanError
from trimbit.kernels.hadamard import factors, transform
from trimbit.model import axes
from trimbit.model.checkpoint.checkpoint import Checkpoint
from trimbit.model.forward.stream import CPU, BlockStream
from trimbit.model.layout import Layout
from trimbit.runtime.rotation import go_online, turn
from trimbit.schema.plan import Rotation


def require_rotatable(layout: Layout) -> None:
    """Refuse a model that cannot be rotated without changing what it computes.

    Raises:
        LayoutError: if its norms do not allow it.
        PlanError: if a size has no Hadamard matrix.
    """
    family, model_type = layout.family, layout.config.model_type
    norms = max(family.attn.norms, family.mlp.norms, key=len)
    if len(norms) > 1:
        raise LayoutError(
            f"{model_type} cannot be rotated: {norms[-1]} scales the channels of what a sub-block writes; "
            "leave rotation out"
        )
    if family.gain != "weight":
        raise LayoutError(f"{model_type} cannot be rotated: its norms multiply by {family.gain}; leave rotation out")
    for dim, what in (("hidden", "hidden_size"), ("mid", "intermediate_size"), ("dv", "head_dim")):
        try:
            factors(layout.sizes[dim])
        except PlanError as err:
            raise PlanError(f"rotation: {what} is {layout.sizes[dim]}, but {err}; leave rotation out") from err


def fold(checkpoint: Checkpoint, layout: Layout, rotation: Rotation) -> Checkpoint:
    """The model with the blocks' weights and biases in the new bases, in fp32, and gains of one in their norms."""
    units = [unit for unit in layout.units.values() if unit.block is not None]
    gains = {f"{norm}.weight" for unit in units for norm in unit.norms}
    norms = {name: unit.norms[0] for unit in units for name in unit.weights}

    def changed(name: str, tensor: Tensor) -> Tensor:
        if name in gains:
            return torch.ones_like(tensor)
        module, _, part = name.rpartition(".")
        if module not in norms:
            return tensor
        weight, w = layout.weights[module], tensor.float()
        if part == "bias":
            return _turned(w, weight.row_axis, layout, rotation)
        if weight.col_axis == "hidden":
            w = w * checkpoint.tensor(f"{norms[module]}.weight").float()
        w = transform(w) if weight.col_axis == "mid" else _turned(w, weight.col_axis, layout, rotation)
        return _turned(w.T, weight.row_axis, layout, rotation).T.contiguous()

    return checkpoint.changed(changed)


def _turned(x: Float[Tensor, "*batch n"], axis: str, layout: Layout, rotation: Rotation) -> Float[Tensor, "*batch n"]:
    """Rotate the parts of an axis that are the residual stream or heads' values."""
    parts, pieces = axes.parts(axis), []
    for piece, part in zip(
        x.split([axes.length("*".join(part), layout.sizes) for part in parts], -1), parts, strict=True
    ):
        if part[-1] == "hidden":
            piece = turn(piece, rotation)
        elif part[-1] == "dv":
            piece = transform(piece.unflatten(-1, (-1, layout.sizes["dv"]))).flatten(-2)
        pieces.append(piece)
    return torch.cat(pieces, -1)


class RotatedStream(BlockStream):
    """The rotated model of a checkpoint, one block at a time.

    Raises:
        LayoutError: if its norms do not allow it.
        PlanError: if a size has no Hadamard matrix.
    """

    rotation: Rotation

    def __init__(
        self, checkpoint: Checkpoint, layout: Layout, rotation: Rotation, compute: torch.dtype = torch.bfloat16,
        device: torch.device = CPU,
    ) -> None:  # fmt: skip
        require_rotatable(layout)
        self.rotation = rotation
        super().__init__(fold(checkpoint, layout, rotation), layout, compute, device)
        self.go_online(self.norm, layout.family.final_norm)

    def go_online(self, root: nn.Module, prefix: str = "") -> None:
        """Add the rotations at run time to a module with this model's weights."""
        go_online(root, self.layout, self.rotation, prefix)

    def embed(self, tokens: Int[Tensor, "rows length"]) -> Float[Tensor, "rows length hidden"]:
        """The first block's input, not rounded to the embedding's dtype."""
        return turn(super().embed(tokens), self.rotation)
