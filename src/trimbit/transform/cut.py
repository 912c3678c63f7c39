"""Cut the modules of a block to the channels that a plan keeps, in the order in which they are stored."""

from typing import Any

from torch import Tensor, nn

from trimbit.model.layout import Layout
from trimbit.model.resolved import ResolvedUnit, ResolvedWeight
from trimbit.runtime.restructure import change_inputs, set_width


def cut_weight(w: Tensor, weight: ResolvedWeight) -> Tensor:
    """The stored rows and columns of a weight, in stored order."""
    for axis, index in enumerate((weight.rows, weight.cols)):
        w = w if index is None else w.index_select(axis, index.to(w.device))
    return w


def cut_unit(root: nn.Module, layout: Layout, unit: ResolvedUnit, prefix: str = "") -> None:
    """Cut a unit's modules, and reorder and round its inputs; `prefix` is removed from the unit's names."""
    for weight in unit.weights.values():
        linear: Any = root.get_submodule(weight.name.removeprefix(prefix))
        linear.weight = nn.Parameter(cut_weight(linear.weight.detach(), weight), requires_grad=False)
        linear.out_features, linear.in_features = weight.shape
        if linear.bias is not None and weight.rows is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[weight.rows], requires_grad=False)
    set_width(root, layout, unit, prefix)
    change_inputs(root, unit, prefix)
