"""Packed layers: weights stay packed in memory and are dequantised layer by layer while computing."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from trimbit.kernels.qtensor import QTensor
from trimbit.kernels.weights import dequantize
from trimbit.schema.precision import Run, code_row_nbytes, group_count, zero_row_nbytes

HEAD_ROWS = 8192  # rows of the head that are dequantised at a time: bounds memory


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
