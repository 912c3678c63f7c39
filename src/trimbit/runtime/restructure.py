"""Gives a model of the original architecture the shapes and packed layers of a `Structure`."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trimbit.errors import ArtifactError
from trimbit.model.forward.absent import drop_unit, set_module
from trimbit.model.layout import Layout, Unit
from trimbit.runtime.inputs import order_dtype, transform_input
from trimbit.runtime.layers import AdaptedLinear, Adapter, PackedEmbedding, PackedLinear, TiedHead
from trimbit.runtime.rotation import go_online
from trimbit.schema.precision import BFloat16
from trimbit.schema.structure import Structure


def set_width(root: nn.Module, layout: Layout, unit: Unit, width: int, prefix: str = "") -> None:
    """Tell an attention module how many KV groups it has left; feed-forward modules need not know."""
    if not unit.name.endswith(".attn"):
        return
    assert unit.module is not None
    module: Any = root.get_submodule(unit.module.removeprefix(prefix))
    heads = width * layout.sizes["g"]
    for name, value in (("num_heads", heads), ("num_key_value_heads", width)):
        if hasattr(module, name):
            setattr(module, name, value)
    if layout.family.attn.sizes_in_config:
        module.config = copy.copy(module.config)
        module.config.num_attention_heads, module.config.num_key_value_heads = heads, width


def restructure(model: PreTrainedModel, layout: Layout, structure: Structure) -> None:
    """Give a model of the original architecture (usually on the meta device) the modules that a structure asks for.

    Raises:
        ArtifactError: if the structure belongs to another model.
    """
    alive = {
        name for unit in layout.units.values() if structure.widths.get(unit.dim or "") != 0 for name in unit.weights
    }
    if odd := sorted(alive ^ structure.weights.keys()):
        raise ArtifactError(
            f"structure and model disagree on {len(odd)} weights, the first is {odd[0]}; "
            "config.json was edited or is damaged"
        )
    for unit in layout.units.values():
        width = structure.widths.get(unit.dim or "", unit.size) if unit.dim else None
        if width == 0:
            drop_unit(model, unit)
            continue
        if width is not None and width != unit.size:
            set_width(model, layout, unit, width)
        for name in unit.weights:
            _install(model, layout, structure, name, width)
    if structure.rotation is not None:
        go_online(model, layout, structure.rotation)
    for site in dict.fromkeys(layout.weights[name].site for name in structure.weights):
        if layout.readers(site):
            _change_input(model, layout, structure, site)
    if layout.tied:
        set_module(model, layout.family.head, TiedHead(model.get_submodule(layout.family.embed)))


def _change_input(model: PreTrainedModel, layout: Layout, structure: Structure, site: str) -> None:
    name, at_output = layout.input_of(site)
    order = None
    if site in structure.gathers:
        reader = layout.readers(site)[0].name
        _, spec = layout.order_tensor(site, sum(run.count for run in structure.weights[reader]))
        device = next(iter(model.get_submodule(reader).state_dict().values())).device
        order = torch.zeros(spec.shape, dtype=order_dtype(spec.dtype), device=device)
    transform_input(model.get_submodule(name), at_output=at_output, order=order, acts=structure.acts.get(site, ()))


def _install(model: PreTrainedModel, layout: Layout, structure: Structure, name: str, width: int | None) -> None:
    weight, runs = layout.weights[name], structure.weights[name]
    old: Any = model.get_submodule(name)
    rows, cols = layout.weight_shape(weight, width)
    bias = weight.bias or name in structure.biases
    rank = structure.adapters.get(name, 0)
    plain = len(runs) == 1 and isinstance(runs[0].precision, BFloat16)
    dtype, device = old.weight.dtype, old.weight.device
    with torch.device(device):
        if isinstance(old, nn.Embedding):
            if not plain:
                scale = getattr(old, "scalar_embed_scale", None)
                set_module(model, name, PackedEmbedding(rows, runs, dtype=dtype, scale=scale))
            return
        kind = AdaptedLinear if rank else nn.Linear
        new = kind(cols, rows, bias=bias, dtype=dtype) if plain else PackedLinear(rows, runs, bias=bias, dtype=dtype)
        if rank:
            new.adapter = Adapter(rows, cols, rank, dtype)
        set_module(model, name, new)
