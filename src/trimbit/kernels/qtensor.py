"""A packed weight: codes, scales, zero points or means, and the runs that give their formats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from trimbit.kernels.pack import pack, pack_digits
from trimbit.kernels.weights import dequantize
from trimbit.schema.precision import BFloat16, Codebook, Run, code_row_nbytes, group_count, zero_row_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class QTensor:
    """A packed weight of shape `rows x cols`.

    The weight is s * c for symmetric runs (c signed), s * (c - z) with a zero point, s * level[c] for a codebook, and
    m + s * level[c] for a codebook with a mean.

    Attributes:
        codes: `code_row_nbytes(runs)` bytes a row; each run starts at a whole byte.
        scales: `group_count(runs)` values a row.
        zeros: zero points, or means as two bytes each (fp16): `zero_row_nbytes(runs)` bytes a row; None if no run has
            any.
        runs: formats along the columns; they cover all columns.

    Raises:
        ValueError: if the bytes of a row do not fit the runs.
    """

    codes: UInt8[Tensor, "rows code_nbytes"]
    scales: Float16[Tensor, "rows groups"]
    zeros: UInt8[Tensor, "rows zero_nbytes"] | None
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        want = (code_row_nbytes(self.runs), group_count(self.runs), zero_row_nbytes(self.runs))
        have = (self.codes.shape[1], self.scales.shape[1], 0 if self.zeros is None else self.zeros.shape[1])
        if want != have:
            raise ValueError(
                f"a row has {have} (bytes of codes, scales, bytes of zero points or means), but its runs need {want}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.codes.shape[0], sum(run.count for run in self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their stored names; an unquantised weight is a single bf16 `weight`."""
        if len(self.runs) == 1 and isinstance(self.runs[0].precision, BFloat16):
            return {"weight": self.codes.view(torch.bfloat16)}
        zeros = {} if self.zeros is None else {"zeros": self.zeros}
        return {"codes": self.codes, "scales": self.scales, **zeros}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], runs: tuple[Run, ...]) -> "QTensor":
        """The inverse of `tensors`."""
        if (weight := tensors.get("weight")) is not None:
            empty = torch.empty(weight.shape[0], 0, dtype=torch.float16, device=weight.device)
            return cls(codes=weight.view(torch.uint8), scales=empty, zeros=None, runs=runs)
        return cls(codes=tensors["codes"], scales=tensors["scales"], zeros=tensors.get("zeros"), runs=runs)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows cols"]:
        """The dense weight."""
        return dequantize(self.codes, self.scales, self.zeros, self.runs, dtype)


def pack_columns(
    codes: Float[Tensor, "rows cols"],
    scales: list[Float[Tensor, "rows _"] | None],
    zeros: list[Float[Tensor, "rows _"] | None],
    runs: tuple[Run, ...],
) -> QTensor:
    """Pack codes that start at 0, as in `Grid` (in bf16 runs: values); scales and zeros have one entry per run."""
    code_parts, zero_parts, at = [], [], 0
    for run, zero in zip(runs, zeros, strict=True):
        part = codes[:, at : at + run.count]
        at += run.count
        precision = run.precision
        if zero is None or isinstance(precision, BFloat16):
            code_parts.append(part.to(torch.bfloat16).contiguous().view(torch.uint8))
            continue
        numbers = part.to(torch.uint8)
        if isinstance(precision, Codebook):
            code_parts.append(pack_digits(numbers, len(precision.levels), precision.per_byte))
            stored = zero.to(torch.float16).view(torch.uint8)
        else:
            code_parts.append(pack(numbers, precision.bits))
            stored = pack(zero.to(torch.uint8), precision.bits)
        if precision.zero_nbytes(run.count):
            zero_parts.append(stored)
    kept = [scale.to(torch.float16) for scale in scales if scale is not None]
    return QTensor(
        codes=torch.cat(code_parts, dim=1),
        scales=torch.cat(kept, dim=1)
        if kept
        else torch.empty(codes.shape[0], 0, dtype=torch.float16, device=codes.device),
        zeros=torch.cat(zero_parts, dim=1) if zero_parts else None,
        runs=runs,
    )


def concat_rows(pieces: Sequence[QTensor]) -> QTensor:
    """Concatenate the rows of packed weights, which all have the same runs."""
    if len(pieces) == 1:
        return pieces[0]
    zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
    return QTensor(
        codes=torch.cat([piece.codes for piece in pieces]),
        scales=torch.cat([piece.scales for piece in pieces]),
        zeros=torch.cat(zeros) if zeros else None,
        runs=pieces[0].runs,
    )
