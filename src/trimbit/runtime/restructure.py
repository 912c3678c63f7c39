"""Give a model of the original architecture the shapes and packed layers of a `Structure`."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trimbit.errors import ArtifactError
from trimbit.model.forward.absent import drop_unit, set_module
from trimbit.model.layout import Layout
from trimbit.model.resolved import ResolvedUnit, ResolvedWeight, join
from trimbit.runtime.inputs import transform_input
from trimbit.runtime.layers import AdaptedLinear, Adapter, PackedEmbedding, PackedLinear, TiedHead
from trimbit.runtime.rotation import go_online
from trimbit.schema.structure import Structure


def set_width(root: nn.Module, layout: Layout, unit: ResolvedUnit, prefix: str = "") -> None:
    """Set the number of kept KV groups in an attention module; feed-forward modules do not need it."""
    width, name = unit.width, unit.origin.module
    if unit.origin.factor != "kv" or width is None or width == unit.origin.size:
        return
    assert name is not None
    module: Any = root.get_submodule(name.removeprefix(prefix))
    heads = width * layout.sizes["g"]
    for field, value in (("num_heads", heads), ("num_key_value_heads", width)):
        if hasattr(module, field):
            setattr(module, field, value)
    if layout.family.attn.sizes_in_config:
        module.config = copy.copy(module.config)
        module.config.num_attention_heads, module.config.num_key_value_heads = heads, width


def change_inputs(root: nn.Module, unit: ResolvedUnit, prefix: str = "") -> None:
    """Reorder and round the inputs of a unit that is already cut; `prefix` is removed from the unit's names."""
    for site in unit.sites.values():
        module = root.get_submodule(site.module.removeprefix(prefix))
        device = next(iter(module.state_dict().values())).device
        order = None if site.gather is None else site.gather.to(device)
        transform_input(module, at_output=site.at_output, order=order, acts=site.acts)


def restructure(model: PreTrainedModel, layout: Layout, structure: Structure) -> None:
    """Replace modules of an original model, usually on the meta device, by those that a structure asks for.

    Raises:
        ArtifactError: if the structure belongs to another model.
    """
    joined = join(structure, layout)
    if odd := sorted(joined.weights.keys() ^ structure.weights.keys()):
        raise ArtifactError(
            f"the structure and the model in config.json disagree on {len(odd)} weights, the first is {odd[0]}; "
            "the file was edited or is damaged: compress the model again"
        )
    for unit in joined.units.values():
        if unit.dropped:
            drop_unit(model, unit.origin)
            continue
        set_width(model, layout, unit)
        for weight in unit.weights.values():
            _install(model, weight)
    if structure.rotation is not None:
        go_online(model, layout, structure.rotation)
    for unit in joined.units.values():
        change_inputs(model, unit)
    if layout.tied:
        set_module(model, layout.family.head, TiedHead(model.get_submodule(layout.family.embed)))


def _install(model: PreTrainedModel, weight: ResolvedWeight) -> None:
    name, (rows, cols), runs, bias, rank = weight.name, weight.shape, weight.runs, weight.bias, weight.rank
    old: Any = model.get_submodule(name)
    plain, dtype, device = weight.plain, old.weight.dtype, old.weight.device
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
