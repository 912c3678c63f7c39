"""What runs a compressed model: packed layers, sub-blocks of any width, and no-ops where a sub-block is gone.

`restructure` gives a model of the original architecture the shapes of a `Structure`; weights stay packed in memory and
are dequantised layer by layer while computing.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trimbit.errors import ArtifactError
from trimbit.kernels.reference import dequantize
from trimbit.model.cache_name import CACHE
from trimbit.model.layout import Layout, Unit
from trimbit.plan import Plan, Rotation
from trimbit.precision import ActRun, BFloat16, Data, KVPrecision, Run, code_row_nbytes, group_count, zero_row_nbytes
from trimbit.quant.qtensor import QTensor
from trimbit.rotate import go_online
from trimbit.site_input import change_input, order_dtype

HEAD_ROWS = 8192  # rows of the head that are dequantised at a time: bounds memory


class Structure(Data):
    """What the runtime needs of a plan, without the index lists.

    Of the orders it names the sites whose order is stored as a tensor; the others are folded into the weights.
    """

    widths: dict[str, int]  # of the dims that are cut
    weights: dict[str, tuple[Run, ...]]
    biases: tuple[str, ...] = ()
    adapters: dict[str, int] = Field(default_factory=dict)
    gathers: tuple[str, ...] = ()
    acts: dict[str, tuple[ActRun, ...]] = Field(default_factory=dict)
    rotation: Rotation | None = None
    kv_cache: KVPrecision | None = None

    @classmethod
    def of(cls, plan: Plan, layout: Layout) -> "Structure":
        """The structure of a plan."""
        return cls(
            widths=plan.widths, weights=plan.weights, biases=plan.biases, adapters=plan.adapters,
            gathers=layout.gathers(plan), acts=plan.acts, rotation=plan.rotation, kv_cache=plan.kv_cache,
        )  # fmt: skip


class Packed(nn.Module):
    """A packed matrix [rows, cols] in the buffers `codes`, `scales` and `zeros`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, rows: int, runs: tuple[Run, ...]) -> None:
        super().__init__()
        self.rows = rows
        self.runs = runs
        self.register_buffer("codes", torch.zeros(rows, code_row_nbytes(runs), dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(rows, group_count(runs), dtype=torch.float16))
        zeros = zero_row_nbytes(runs)
        self.register_buffer("zeros", torch.zeros(rows, zeros, dtype=torch.uint8) if zeros else None)

    @classmethod
    def of(cls, packed: QTensor) -> "Packed":
        """The same as a module."""
        made = cls(packed.shape[0], packed.runs)
        made.codes, made.scales, made.zeros = packed.codes, packed.scales, packed.zeros
        return made

    def dense(self, dtype: torch.dtype, rows: slice | Tensor = slice(None)) -> Float[Tensor, "rows cols"]:
        """Some rows of the matrix."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return dequantize(self.codes[rows], self.scales[rows], zeros, self.runs, dtype)

    def extra_repr(self) -> str:
        """Shape and formats, for `print(model)`."""
        formats = ", ".join(f"{run.count}x{run.precision.name}" for run in self.runs)
        return f"rows={self.rows}, cols={sum(run.count for run in self.runs)}, runs=[{formats}]"


class _FrozenProduct(torch.autograd.Function):
    """W x + b whose W is dequantised again for the gradient of x, so that training keeps the codes alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "PackedLinear") -> Tensor:  # noqa: ANN401
        ctx.layer = layer
        return functional.linear(x, layer.dense(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grad @ ctx.layer.dense(grad.dtype), None


class Adapter(nn.Module):
    """A low-rank pair beside a weight: y = B A x."""

    def __init__(self, rows: int, cols: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rank, cols, dtype=dtype), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=dtype), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """Two thin products."""
        return functional.linear(functional.linear(x, self.a), self.b)


class AdaptedLinear(nn.Linear):
    """An unquantised y = W x + b with a low-rank pair beside it, unless it is taken out."""

    def __init__(self, cols: int, rows: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(cols, rows, bias=bias, dtype=dtype)
        self.adapter: Adapter | None = None

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """The layer and its pair."""
        y = super().forward(x)
        return y if self.adapter is None else y + self.adapter(x)


class PackedLinear(Packed):
    """y = W x + b with W packed, and perhaps a low-rank pair beside it."""

    def __init__(self, rows: int, runs: tuple[Run, ...], *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(rows, runs)
        self.in_features = sum(run.count for run in runs)
        self.out_features = rows
        self.bias = nn.Parameter(torch.zeros(rows, dtype=dtype), requires_grad=False) if bias else None
        self.adapter: Adapter | None = None

    @property
    def qweight(self) -> Tensor:
        """The codes, by the name that PEFT knows quantised layers by."""
        return self.codes

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """Dequantise and multiply."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            y = functional.linear(x, self.dense(x.dtype), self.bias)
        return y if self.adapter is None else y + self.adapter(x)


class PackedEmbedding(Packed):
    """Rows of a packed table, times a constant where the family scales its embedding."""

    anchor: Tensor

    def __init__(self, rows: int, runs: tuple[Run, ...], *, dtype: torch.dtype, scale: float | None) -> None:
        super().__init__(rows, runs)
        self.num_embeddings = rows
        self.embedding_dim = sum(run.count for run in runs)
        self.register_buffer("anchor", torch.zeros(0, dtype=dtype), persistent=False)  # follows the model's dtype
        self.embed_scale = scale  # no buffer: nothing would fill it after a load from the meta device

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch cols"]:
        """Look rows up and dequantise them alone."""
        dtype = self.anchor.dtype
        rows = self.dense(dtype, tokens.flatten()).view(*tokens.shape, -1)
        return rows if self.embed_scale is None else rows * torch.tensor(self.embed_scale, dtype=dtype)


class TiedHead(nn.Module):
    """A head that reads the embedding's table, packed or not, which is stored once."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        """Logits, some thousand rows of the table at a time."""
        embedding = self.__dict__["embedding"]
        if not isinstance(embedding, Packed):
            return functional.linear(x, embedding.weight)
        parts = [slice(at, at + HEAD_ROWS) for at in range(0, embedding.rows, HEAD_ROWS)]
        return torch.cat([functional.linear(x, embedding.dense(x.dtype, part)) for part in parts], dim=-1)


class NoAttention(nn.Module):
    """Stands where attention was dropped: adds nothing, but keeps the cache's count of tokens."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:  # noqa: ANN401
        """Zero."""
        cache = kwargs.get(CACHE)
        if cache is not None:
            empty = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(empty, empty, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Stands where a feed-forward sub-block was dropped: adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(hidden_states)


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the sub-module at a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def drop_unit(root: nn.Module, unit: Unit, prefix: str = "") -> None:
    """Replace a whole sub-block by a no-op and its norms by the identity; `prefix` is cut off the unit's names."""
    assert unit.module is not None
    assert unit.block is not None
    gone = NoAttention(unit.block) if unit.name.endswith(".attn") else NoFeedForward()
    set_module(root, unit.module.removeprefix(prefix), gone)
    for norm in unit.norms:
        set_module(root, norm.removeprefix(prefix), nn.Identity())


@contextmanager
def only_half(block: nn.Module, layout: Layout, unit: Unit) -> Iterator[None]:
    """Make a block run one sub-block alone: x + f(norm(x)), with the other one a no-op."""
    assert unit.block is not None
    attention = unit.name.endswith(".attn")
    other = (layout.family.mlp if attention else layout.family.attn).module
    module = block.get_submodule(other)
    set_module(block, other, NoFeedForward() if attention else NoAttention(unit.block))
    try:
        yield
    finally:
        set_module(block, other, module)


@contextmanager
def input_known(root: nn.Module, unit: Unit, x: Tensor, prefix: str = "") -> Iterator[None]:
    """Make a sub-block run from its last projection on, whose input x, reordered and rounded, is known."""
    assert unit.module is not None
    assert unit.out_weight is not None
    module: Any = root.get_submodule(unit.module.removeprefix(prefix))
    project = root.get_submodule(unit.out_weight.removeprefix(prefix))
    attention = unit.name.endswith(".attn")
    module.forward = lambda *_, **__: (project.forward(x), None) if attention else project.forward(x)
    try:
        yield
    finally:
        del module.forward


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
    name, gives = layout.input_of(site)
    order = None
    if site in structure.gathers:
        reader = layout.readers(site)[0].name
        _, spec = layout.order_tensor(site, sum(run.count for run in structure.weights[reader]))
        device = next(iter(model.get_submodule(reader).state_dict().values())).device
        order = torch.zeros(spec.shape, dtype=order_dtype(spec.dtype), device=device)
    change_input(model.get_submodule(name), gives=gives, order=order, acts=structure.acts.get(site, ()))


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
