"""Compression of one weight: by a quantiser, with a low-rank pair if the plan has one."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from trimbit.calibrate.moments import Moments
from trimbit.errors import NumericsError, RecipeError
from trimbit.kernels.qtensor import QTensor
from trimbit.schema.base import Schema
from trimbit.schema.precision import BFloat16, Run
from trimbit.transform.quant import rtn
from trimbit.transform.repair import lowrank
from trimbit.transform.repair.lowrank import LowRank


@dataclass(frozen=True, slots=True)
class Compressed:
    """A packed weight and its low-rank pair."""

    packed: QTensor
    pair: LowRank | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the layer multiplies by; summed in fp32 and rounded once."""
        if self.pair is None:
            return self.packed.dequantize(dtype)
        return (self.packed.dequantize() + self.pair.dense()).to(dtype)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str, runs: tuple[Run, ...]) -> "Compressed":
        """The inverse of `tensors`; the given tensors may include those of other weights."""
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        pair = LowRank(a=own["adapter.a"].float(), b=own["adapter.b"].float()) if "adapter.a" in own else None
        return cls(QTensor.of(own, runs), pair)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The stored tensors by name."""
        stored = {f"{name}.{part}": tensor for part, tensor in self.packed.tensors().items()}
        if self.pair is not None:
            stored |= {
                f"{name}.adapter.a": self.pair.a.to(torch.bfloat16), f"{name}.adapter.b": self.pair.b.to(torch.bfloat16)
            }  # fmt: skip
        return stored


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCompressor:
    """How a weight is compressed: a quantiser with its configuration, and the start of low-rank pairs."""

    module: ModuleType
    config: Schema
    pairs: lowrank.Config | None = None
    seed: int = 0

    @property
    def needs_moments(self) -> bool:
        """Whether H of a weight's inputs is needed."""
        return self.module.NEEDS_MOMENTS or (self.pairs is not None and self.pairs.init == "qera")

    def compress(
        self, ws: Sequence[Tensor], moments: Moments | None, names: Sequence[str], runs: Sequence[tuple[Run, ...]],
        ranks: Sequence[int],
    ) -> list[Compressed]:  # fmt: skip
        """Compress weights that read the same input; those of rank 0 get no pair. Errors name a weight."""
        if not any(ranks):
            return [Compressed(packed) for packed in self._quantize_all(ws, moments, names[0], runs)]
        return [self._one(*one, moments) for one in zip(ws, names, runs, ranks, strict=True)]

    def _one(self, w: Tensor, name: str, runs: tuple[Run, ...], rank: int, moments: Moments | None) -> Compressed:
        def quantize(part: Tensor) -> QTensor:
            return self._quantize_all([part], moments, name, [runs])[0]

        if rank == 0:
            return Compressed(quantize(w))
        assert self.pairs is not None, f"{name} has a low-rank pair, but nothing says how it starts"
        # a pair that corrects next to nothing is no start for training
        init = "zeros" if _unquantised(runs) else self.pairs.init
        config = self.pairs.model_copy(update={"rank": rank, "init": init})
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        try:
            return Compressed(*lowrank.correct(w, quantize, moments, config, generator))
        except RecipeError as err:
            raise RecipeError(f"{name}: {err}") from err

    def _quantize_all(
        self, ws: Sequence[Tensor], moments: Moments | None, name: str, runs: Sequence[tuple[Run, ...]]
    ) -> list[QTensor]:
        if all(_unquantised(own) for own in runs):
            return rtn.quantize_all(ws, None, runs, rtn.Config())  # a cast
        try:
            packed: list[QTensor] = self.module.quantize_all(ws, moments, runs, self.config)
        except NumericsError as err:
            raise NumericsError(f"{name}: {err}") from err
        return packed


def _unquantised(runs: tuple[Run, ...]) -> bool:
    return all(isinstance(run.precision, BFloat16) for run in runs)


def identity_moments(n: int) -> Moments:
    """The moments of a lookup, which reads every row of the embedding as it is."""
    return Moments(count=1, h=torch.eye(n), mean=torch.zeros(n))


def tied_moments(head: Moments) -> Moments:
    """The moments of a tied embedding (ours): the head's inputs and the lookup, with equal weight."""
    scale = head.h.diagonal().mean()
    eye = torch.eye(head.h.shape[0], device=head.h.device)
    return Moments(count=head.count, h=head.h / scale + eye, mean=head.mean)
