"""Cut the modules of a block to what a plan keeps, and put their inputs in order."""

from typing import Any

import torch
from torch import Tensor, nn

from trimbit.model import axes
from trimbit.model.layout import Layout, Unit, Weight
from trimbit.runtime.inputs import order_dtype, transform_input
from trimbit.runtime.restructure import set_width
from trimbit.schema.plan import Plan


def cut_weight(w: Tensor, weight: Weight, layout: Layout, unit: Unit, keep: tuple[int, ...] | None) -> Tensor:
    """The rows and columns of a weight that a cut of its unit keeps."""
    if keep is None or unit.dim is None:
        return w
    factor = unit.dim.rsplit(".", 1)[1]
    for axis, pattern in enumerate((weight.row_axis, weight.col_axis)):
        if axes.mentions(pattern, factor):
            w = w.index_select(axis, axes.kept_indices(pattern, layout.sizes, factor, keep))
    return w


def cut_unit(root: nn.Module, layout: Layout, unit: Unit, keep: tuple[int, ...], prefix: str = "") -> None:
    """Cut a unit's modules to the kept indices of its dim; `prefix` is cut off the unit's names."""
    for name in unit.weights:
        linear: Any = root.get_submodule(name.removeprefix(prefix))
        weight = layout.weights[name]
        linear.weight = nn.Parameter(
            cut_weight(linear.weight.detach(), weight, layout, unit, keep), requires_grad=False
        )
        linear.out_features, linear.in_features = linear.weight.shape
        if linear.bias is not None and weight.row_axis != "hidden":
            cut = cut_weight(linear.bias.detach()[:, None], weight, layout, unit, keep)
            linear.bias = nn.Parameter(cut[:, 0], requires_grad=False)
    set_width(root, layout, unit, len(keep), prefix)


def change_sites(root: nn.Module, layout: Layout, plan: Plan, unit: Unit, prefix: str = "") -> None:
    """Reorder and round the inputs of a unit that is cut already; `prefix` is cut off the unit's names."""
    for site in dict.fromkeys(layout.weights[name].site for name in unit.weights):
        order = _ordered(root, layout, plan, site, prefix) if site in plan.orders else None
        name, at_output = layout.input_of(site)
        module = root.get_submodule(name.removeprefix(prefix))
        transform_input(module, at_output=at_output, order=order, acts=plan.acts.get(site, ()))


def _ordered(root: nn.Module, layout: Layout, plan: Plan, site: str, prefix: str) -> Tensor | None:
    """Permute the columns of a site's weights; gives the order to gather, unless it folds into the weights before."""
    order = torch.tensor(plan.orders[site])
    readers = layout.readers(site)
    for weight in readers:
        linear: Any = root.get_submodule(weight.name.removeprefix(prefix))
        linear.weight = nn.Parameter(linear.weight.detach()[:, order], requires_grad=False)
    rows = layout.folded_rows(site, plan)
    for name, index in (rows or {}).items():
        linear = root.get_submodule(name.removeprefix(prefix))
        for parameter in linear.parameters():
            parameter.data = parameter.data[index]
    if rows is not None:
        return None
    _, spec = layout.order_tensor(site, len(order))
    return order.to(order_dtype(spec.dtype))
