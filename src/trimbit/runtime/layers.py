"""Packed layers: weights stay packed in memory; each layer dequantises its weight when it runs."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from trimbit.kernels.qtensor import QTensor
from trimbit.kernels.weights import dequantize
from trimbit.schema.precision import Run, code_row_nbytes, group_count, zero_row_nbytes

HEAD_ROWS = 8192  # rows of the head dequantised at a time, to bound memory


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
        """A module with the tensors of a packed weight."""
        made = cls(packed.shape[0], packed.runs)
        made.codes, made.scales, made.zeros = packed.codes, packed.scales, packed.zeros
        return made

    def dense(self, dtype: torch.dtype, rows: slice | Tensor = slice(None)) -> Float[Tensor, "rows cols"]:
        """The dequantised matrix, or some of its rows."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return dequantize(self.codes[rows], self.scales[rows], zeros, self.runs, dtype)

    def extra_repr(self) -> str:
        """Shape and formats, for `print(model)`."""
        formats = ", ".join(f"{run.count}x{run.precision.name}" for run in self.runs)
        return f"rows={self.rows}, cols={sum(run.count for run in self.runs)}, runs=[{formats}]"


class _FrozenProduct(torch.autograd.Function):
    """W x + b; the backward pass dequantises W again, so that only its codes stay in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "PackedLinear") -> Tensor:  # noqa: ANN401
        ctx.layer = layer
        return functional.linear(x, layer.dense(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grad @ ctx.layer.dense(grad.dtype), None


class Adapter(nn.Module):
    """The low-rank pair of a weight: y = B A x, with A [rank, cols] and B [rows, rank]."""

    def __init__(self, rows: int, cols: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rank, cols, dtype=dtype), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=dtype), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """B A x, by two thin products."""
        return functional.linear(functional.linear(x, self.a), self.b)


class AdaptedLinear(nn.Linear):
    """An unquantised y = W x + b, plus a low-rank pair B A x if `adapter` is set."""

    def __init__(self, cols: int, rows: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(cols, rows, bias=bias, dtype=dtype)
        self.adapter: Adapter | None = None

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """The output of the layer plus that of its pair."""
        y = super().forward(x)
        return y if self.adapter is None else y + self.adapter(x)


class PackedLinear(Packed):
    """y = W x + b with W packed, plus a low-rank pair B A x if `adapter` is set."""

    def __init__(self, rows: int, runs: tuple[Run, ...], *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(rows, runs)
        self.in_features = sum(run.count for run in runs)
        self.out_features = rows
        self.bias = nn.Parameter(torch.zeros(rows, dtype=dtype), requires_grad=False) if bias else None
        self.adapter: Adapter | None = None

    @property
    def qweight(self) -> Tensor:
        """The codes, under the name by which PEFT recognises quantised layers."""
        return self.codes

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """Dequantise and multiply."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            y = functional.linear(x, self.dense(x.dtype), self.bias)
        return y if self.adapter is None else y + self.adapter(x)


class PackedEmbedding(Packed):
    """An embedding with a packed table; its rows are multiplied by a constant in families that do so."""

    anchor: Tensor

    def __init__(self, rows: int, runs: tuple[Run, ...], *, dtype: torch.dtype, scale: float | None) -> None:
        super().__init__(rows, runs)
        self.num_embeddings = rows
        self.embedding_dim = sum(run.count for run in runs)
        self.register_buffer("anchor", torch.zeros(0, dtype=dtype), persistent=False)  # follows the model's dtype
        self.embed_scale = scale  # not a buffer: loading from the meta device would leave it unfilled

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch cols"]:
        """Look up rows, and dequantise only these."""
        dtype = self.anchor.dtype
        rows = self.dense(dtype, tokens.flatten()).view(*tokens.shape, -1)
        return rows if self.embed_scale is None else rows * torch.tensor(self.embed_scale, dtype=dtype)


class TiedHead(nn.Module):
    """A head that shares the embedding's table, packed or not."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        """Logits; a packed table is dequantised `HEAD_ROWS` rows at a time."""
        embedding = self.__dict__["embedding"]
        if not isinstance(embedding, Packed):
            return functional.linear(x, embedding.weight)
        parts = [slice(at, at + HEAD_ROWS) for at in range(0, embedding.rows, HEAD_ROWS)]
        return torch.cat([functional.linear(x, embedding.dense(x.dtype, part)) for part in parts], dim=-1)
