"""Apply a plan to one block after the other, each on its inputs from the compressed blocks before it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimbit.calibrate.moments import Accumulator, Moments
from trimbit.calibrate.taps import Tap
from trimbit.calibrate.teacher import Teacher
from trimbit.model.forward.compute import computing
from trimbit.model.forward.halves import input_known, only_half
from trimbit.model.forward.logits import compare_logits, following, head_of, log_softmax, logit_slices
from trimbit.model.forward.stream import BlockStream, Chunks, embed_chunks
from trimbit.model.layout import Unit, Weight
from trimbit.model.resolved import Resolved, ResolvedUnit, ResolvedWeight
from trimbit.transform.cut import cut_unit
from trimbit.transform.repair import refit
from trimbit.transform.weight import Compressed, WeightCompressor

HIDDEN = ("compressed", "held_out")


class _Job:
    """The state of one application: the hidden states of the compressed model."""

    def __init__(
        self, stream: BlockStream, resolved: Resolved, tokens: Tensor, compressor: WeightCompressor,
        repair: refit.Config, embedding: Compressed, held_out: Tensor | None,
    ) -> None:  # fmt: skip
        self.stream = stream
        self.layout = stream.layout
        self.resolved = resolved
        self.compressor = compressor
        self.repair = repair
        self.norm = as_stored(stream.norm)
        self.inputs: list[Tensor] = []  # of the unit's last projection, for each chunk
        with stream.embedding_replaced(embedding.dense(torch.bfloat16)):
            self.compressed: Chunks = embed_chunks(stream, tokens)
            self.held_out: Chunks = embed_chunks(stream, held_out) if held_out is not None else []

    @property
    def hidden(self) -> dict[str, Chunks]:
        """The hidden states between two blocks, by the name of their attribute."""
        return {name: getattr(self, name) for name in HIDDEN}

    @hidden.setter
    def hidden(self, states: Mapping[str, Chunks]) -> None:
        for name in HIDDEN:
            setattr(self, name, states[name])

    def block(self, index: int) -> dict[str, Tensor]:
        """Compress one block, half by half, and move the hidden states past it; returns its stored tensors."""
        dense = self.stream.load(index)
        block = as_stored(dense)
        prefix = f"{self.layout.family.blocks}.{index}."
        stored: dict[str, Tensor] = {}
        for kind in ("attn", "mlp"):
            unit = self.resolved.units[f"blocks.{index}.{kind}"]
            with only_half(block, self.layout, unit.origin), only_half(dense, self.layout, unit.origin):
                if not unit.dropped:
                    cut_unit(block, self.layout, unit, prefix)
                    block.to(self.stream.device)  # orders, too
                    stored |= self._compress_unit(index, unit, dense, block, prefix)
                    self._advance_compressed(index, unit.origin, block, prefix)
                    self._advance(self.held_out, index, block)
        return stored

    def _advance(self, hidden: Chunks, index: int, block: nn.Module) -> None:
        for at, chunk in enumerate(hidden):
            hidden[at] = self.stream.run(index, block, chunk)

    def _advance_compressed(self, index: int, unit: Unit, block: nn.Module, prefix: str) -> None:
        """Move past a unit; if the inputs of its last projection are known, the layers before it are not run again."""
        if not self.inputs:
            self._advance(self.compressed, index, block)
        for at, x in enumerate(self.inputs):
            chunk = self.compressed[at]
            with input_known(block, unit, x.unflatten(0, chunk.shape[:-1]), prefix):
                self.compressed[at] = self.stream.run(index, block, chunk)
        self.inputs = []

    @torch.no_grad()
    def damage(self, original: Teacher, head: Tensor, held_out: Tensor) -> list[float]:
        """KL(original || compressed) on each held-out row, from the states after the last block and the own head."""
        found: list[float] = []
        config, own_head = self.layout.config, head_of(head)
        for own, tokens in zip(_rows(self.held_out), held_out, strict=True):
            taught = logit_slices(original.head, config, original.hidden(tokens))
            student = logit_slices(own_head, config, self.norm(own))
            with computing(self.stream.compute, self.stream.device.type):
                log_ps = (log_softmax(logits) for _, logits in taught)
                found.append(compare_logits(log_ps, student, following(tokens[None])).kl)
        return found

    @torch.no_grad()
    def final_moments(self) -> Moments:
        """Moments of the head's inputs, after the last block."""
        final = Accumulator()
        for chunk in self.compressed:
            final.add(self.norm(chunk).flatten(0, -2))
        return final.moments()

    def _compress_unit(
        self, index: int, unit: ResolvedUnit, dense: nn.Module, block: nn.Module, prefix: str
    ) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for site in unit.sites:
            first, *_ = members = [weight for weight in unit.weights.values() if weight.origin.site == site]
            modules: list[Any] = [block.get_submodule(weight.name.removeprefix(prefix)) for weight in members]
            train, held = self._moments(index, first.origin, dense if first.refit else None, block, prefix)
            if first.refit:
                original: Any = dense.get_submodule(first.name.removeprefix(prefix))
                compressed = self._refit_and_compress(first, modules[0], original, train, held)
            else:
                moments = train.moments() if train else None
                compressed = self._compress(members, [linear.weight.detach() for linear in modules], moments)
            for weight, linear, one in zip(members, modules, compressed, strict=True):
                linear.weight = nn.Parameter(one.dense(), requires_grad=False)
                stored |= one.tensors(weight.name)
                if linear.bias is not None:
                    stored[f"{weight.name}.bias"] = linear.bias.detach().to(torch.bfloat16)
        for name in unit.vectors:
            stored[name] = block.get_parameter(name.removeprefix(prefix)).detach().to(torch.bfloat16)
        for resolved in unit.sites.values():
            stored |= resolved.stored()
        return stored

    def _compress(
        self, members: Sequence[ResolvedWeight], ws: Sequence[Tensor], moments: Moments | None
    ) -> list[Compressed]:
        names, runs, ranks = zip(*((weight.name, weight.runs, weight.rank) for weight in members), strict=True)
        return self.compressor.compress(ws, moments, names, runs, ranks)

    def _moments(
        self, index: int, weight: Weight, dense: nn.Module | None, block: nn.Module, prefix: str
    ) -> tuple[Accumulator | None, Accumulator]:
        """Moments of a site; with `dense`, also cross moments with that half, split into train and held-out."""
        train, held = Accumulator(), Accumulator()
        if dense is None and not self.compressor.needs_moments:
            return None, held
        relative = weight.name.removeprefix(prefix)
        left = (
            self._fitted_tokens() if dense is not None else sum(len(chunk.flatten(0, 1)) for chunk in self.compressed)
        )
        for chunk in self.compressed:
            x_dense = None
            if dense is not None:
                with Tap({"x": dense.get_submodule(relative)}, stop_at="x") as seen:
                    self.stream.run(index, dense, chunk)
                x_dense = seen["x"]
            with Tap({"x": block.get_submodule(relative)}, stop_at="x") as seen:
                self.stream.run(index, block, chunk)
            x = seen["x"]
            for part, own in ((train, slice(left)), (held, slice(left, None))):
                if len(x[own]):
                    part.add(x[own], None if x_dense is None else x_dense[own])
            left = max(0, left - len(x))
            if weight.name == self.layout.units[weight.unit].out_weight:
                self.inputs.append(x)
        return train, held

    def _fitted_tokens(self) -> int:
        """The number of tokens for fitting a refit; the rest, whole rows if there are several, choose its ridge."""
        rows, length = sum(len(chunk) for chunk in self.compressed), self.compressed[0].shape[1]
        if rows == 1:
            return length - max(1, round(length * self.repair.held_out))
        return length * (rows - max(1, round(rows * self.repair.held_out)))

    def _refit_and_compress(
        self, weight: ResolvedWeight, linear: Any, original: Any, train: Accumulator | None, held: Accumulator  # noqa: ANN401
    ) -> list[Compressed]:  # fmt: skip
        assert train is not None
        w, bias = original.weight.detach(), None if original.bias is None else original.bias.detach()
        fitted = refit.refit(w, linear.weight.detach(), bias, train.moments(), held.moments(), self.repair)
        both = train.plus(held).moments()
        compressed = self._compress([weight], [fitted.weight], both)
        shift = refit.bias_for(w, compressed[0].dense(), bias, both).bfloat16().float()  # as it is stored
        linear.bias = nn.Parameter(shift, requires_grad=False)
        return compressed


def as_stored(module: nn.Module) -> nn.Module:
    """A copy whose norms and biases are rounded to bf16, as they are stored."""
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return copied


def _rows(chunks: Chunks) -> Iterator[Tensor]:
    return (row for chunk in chunks for row in chunk)
