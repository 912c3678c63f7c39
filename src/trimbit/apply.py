"""Apply a plan: cut, refit and quantise block by block, each on the inputs that the compressed blocks before it give.

Each block is passed in the order of its sites, so that H of a site already carries the error of everything before it. A
refit aims at what the uncut sub-block makes of these same inputs: aimed at the dense model's, it shrinks what it keeps,
because the compressed inputs are noisy (docs/benchmarks.md has the figures). Held-out rows, untouched by any fit, go
along in the dense model too, and say at the end what the plan really costs.
"""

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from trimbit.artifact import Writer
from trimbit.errors import NumericsError, PlanError, RecipeError
from trimbit.model import axes
from trimbit.model.head import following, judge, logit_slices
from trimbit.model.layout import Layout, Unit, Weight
from trimbit.model.products import computing
from trimbit.model.stream import BlockStream, Chunks, embed_chunks
from trimbit.plan import Plan
from trimbit.precision import BFloat16, Data, Run
from trimbit.progress import Progress
from trimbit.quant import rtn
from trimbit.quant.qtensor import QTensor
from trimbit.repair import lowrank, refit
from trimbit.repair.lowrank import LowRank
from trimbit.runtime import input_known, only_half, set_width
from trimbit.site_input import change_input, order_dtype, stored_order
from trimbit.stats import Accumulator, Moments, Stats, Tap


@dataclass(frozen=True, slots=True)
class Compressed:
    """A packed weight, and the low-rank pair beside it."""

    packed: QTensor
    pair: LowRank | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the layer multiplies by."""
        dense = self.packed.dequantize(dtype)
        return dense if self.pair is None else dense + self.pair.dense().to(dtype)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The stored tensors by name."""
        stored = {f"{name}.{part}": tensor for part, tensor in self.packed.tensors().items()}
        if self.pair is not None:
            stored |= {
                f"{name}.adapter.a": self.pair.a.to(torch.bfloat16), f"{name}.adapter.b": self.pair.b.to(torch.bfloat16)
            }  # fmt: skip
        return stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a weight is compressed: a quantiser with its constants, and how low-rank pairs start."""

    module: ModuleType
    config: Data
    pairs: lowrank.Config | None = None
    seed: int = 0

    @property
    def needs_moments(self) -> bool:
        """Whether H of a weight's inputs is needed."""
        return self.module.NEEDS_MOMENTS or (self.pairs is not None and self.pairs.start == "qera")

    def compress(
        self, ws: Sequence[Tensor], moments: Moments | None, names: Sequence[str], runs: Sequence[tuple[Run, ...]],
        ranks: Sequence[int],
    ) -> list[Compressed]:  # fmt: skip
        """Compress weights that read the same input; those of rank 0 have no pair. An error names a weight."""
        if not any(ranks):
            return [Compressed(packed) for packed in self._quantize_all(ws, moments, names[0], runs)]
        return [self._one(*one, moments) for one in zip(ws, names, runs, ranks, strict=True)]

    def _one(self, w: Tensor, name: str, runs: tuple[Run, ...], rank: int, moments: Moments | None) -> Compressed:
        def quantize(part: Tensor) -> QTensor:
            return self._quantize_all([part], moments, name, [runs])[0]

        if rank == 0:
            return Compressed(quantize(w))
        assert self.pairs is not None, f"{name} has a low-rank pair, but nothing says how it starts"
        # a pair that makes up for next to nothing is no start for training
        start = "zeros" if _unquantised(runs) else self.pairs.start
        config = self.pairs.model_copy(update={"rank": rank, "start": start})
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


def apply_plan(
    stream: BlockStream, plan: Plan, tokens: Int[Tensor, "rows length"], method: Method, repair: refit.Config | None,
    stats: Stats | None, writer: Writer, progress: Progress, held_out: Int[Tensor, "held held_length"] | None = None,
) -> float | None:  # fmt: skip
    """Write all tensors of a plan through `writer`; memory holds one block, twice, and the hidden states.

    `stats` give H of a tied head, whose table is quantised first because the blocks read it too; a quantiser that
    needs no moments needs no `stats`.

    Returns:
        KL(original || compressed) on the `held_out` tokens, in nats a token; None without any.

    Raises:
        PlanError: if the plan does not fit the model, or is in another basis than `stream`.
        NumericsError: if H of a site cannot be factored, naming the weight.
    """
    layout = stream.layout
    layout.check(plan)
    if plan.rotation != stream.rotation:
        raise PlanError(f"the plan's rotation is {plan.rotation}, but the model is run with {stream.rotation}")
    family = layout.family
    needs = method.needs_moments
    table = stream.checkpoint.tensor(f"{family.embed}.weight").float()
    lookup = identity_moments(table.shape[1])
    if layout.tied and needs:
        assert stats is not None, "a tied head needs statistics"
        lookup = tied_moments(stats.moments("head_in"))
    (packed,) = method.compress([table], lookup, [family.embed], [plan.weights[family.embed]], [0])
    writer.add(packed.tensors(family.embed))
    job = _Job(stream, plan, tokens, method, repair or refit.Config(), packed, held_out)
    del table
    for index in range(layout.blocks):
        writer.add(job.block(index))
        progress(index + 1, layout.blocks)
    if not layout.tied:
        final = Accumulator()
        for chunk in job.compressed if needs else ():
            final.add(stream.final_norm(chunk).flatten(0, -2))
        head = stream.checkpoint.tensor(f"{family.head}.weight").float()
        moments = final.moments() if needs else None
        (packed,) = method.compress([head], moments, [family.head], [plan.weights[family.head]], [0])
        writer.add(packed.tensors(family.head))
    writer.add({name: stream.checkpoint.tensor(name).to(torch.bfloat16) for name in layout.fixed})
    if held_out is None:
        return None
    head_name = family.embed if layout.tied else family.head
    original = stream.checkpoint.tensor(f"{head_name}.weight").to(stream.compute)
    return job.damage(original, packed.dense(torch.bfloat16).to(stream.compute), held_out)


def identity_moments(n: int) -> Moments:
    """The moments of a lookup: every row of the table is read as it is."""
    return Moments(count=1, h=torch.eye(n), mean=torch.zeros(n))


def tied_moments(head: Moments) -> Moments:
    """The moments of a tied table (ours): the head's inputs, and with equal weight the lookup."""
    scale = head.h.diagonal().mean()
    eye = torch.eye(head.h.shape[0])
    return Moments(count=head.count, h=head.h / scale + eye, mean=head.mean)


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
        name, gives = layout.input_of(site)
        module = root.get_submodule(name.removeprefix(prefix))
        change_input(module, gives=gives, order=order, acts=plan.acts.get(site, ()))


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


class _Job:
    """The state of one application: the hidden states of both paths."""

    def __init__(
        self, stream: BlockStream, plan: Plan, tokens: Tensor, method: Method, repair: refit.Config,
        table: Compressed, held_out: Tensor | None,
    ) -> None:  # fmt: skip
        self.stream = stream
        self.layout = stream.layout
        self.plan = plan
        self.method = method
        self.repair = repair
        self.inputs: list[Tensor] = []  # of the unit's last projection, for each chunk
        self.held_dense: Chunks = embed_chunks(stream, held_out) if held_out is not None else []
        with stream.embedding_replaced(table.dense(torch.bfloat16)):
            self.compressed: Chunks = embed_chunks(stream, tokens)
            self.held_compressed: Chunks = embed_chunks(stream, held_out) if held_out is not None else []

    def _refits(self, unit: Unit) -> bool:
        if unit.dim is None or self.layout.dropped(unit, self.plan):
            return False
        return unit.out_weight in self.plan.biases

    def block(self, index: int) -> dict[str, Tensor]:
        """Compress one block, half by half, and move the hidden states past it; returns its stored tensors."""
        dense = self.stream.load(index)
        block = copy.deepcopy(dense)
        prefix = f"{self.layout.family.blocks}.{index}."
        stored: dict[str, Tensor] = {}
        for kind in ("attn", "mlp"):
            unit = self.layout.units[f"blocks.{index}.{kind}"]
            with only_half(block, self.layout, unit), only_half(dense, self.layout, unit):
                if not self.layout.dropped(unit, self.plan):
                    if unit.dim in self.plan.cuts:
                        cut_unit(block, self.layout, unit, self.plan.cuts[unit.dim], prefix)
                    change_sites(block, self.layout, self.plan, unit, prefix)
                    stored |= self._compress_unit(index, unit, dense, block, prefix)
                    self._advance_compressed(index, unit, block, prefix)
                    self._advance(self.held_compressed, index, block)
                self._advance(self.held_dense, index, dense)
        return stored

    def _advance(self, hidden: Chunks, index: int, block: nn.Module) -> None:
        for at, chunk in enumerate(hidden):
            hidden[at] = self.stream.run(index, block, chunk)

    def _advance_compressed(self, index: int, unit: Unit, block: nn.Module, prefix: str) -> None:
        """Move past a unit; what lies before its last projection is not run again where its inputs were seen."""
        if not self.inputs:
            self._advance(self.compressed, index, block)
        for at, x in enumerate(self.inputs):
            chunk = self.compressed[at]
            with input_known(block, unit, x.unflatten(0, chunk.shape[:-1]), prefix):
                self.compressed[at] = self.stream.run(index, block, chunk)
        self.inputs = []

    def damage(self, original: Tensor, compressed: Tensor, held_out: Tensor) -> float:
        """KL(original || compressed) on the held-out rows, which are past the last block, with both heads' weights."""
        dense, own = (
            logit_slices(
                partial(functional.linear, weight=weight),
                self.layout.config,
                torch.cat([self.stream.final_norm(chunk).flatten(0, -2) for chunk in chunks]),
            )
            for weight, chunks in ((original, self.held_dense), (compressed, self.held_compressed))
        )
        with computing(self.stream.compute):
            return judge((torch.log_softmax(logits, -1) for _, logits in dense), own, following(held_out)).kl

    def _compress_unit(
        self, index: int, unit: Unit, dense: nn.Module, block: nn.Module, prefix: str
    ) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        sites: dict[str, list[Weight]] = {}
        for name in unit.weights:
            sites.setdefault(self.layout.weights[name].site, []).append(self.layout.weights[name])
        for members in sites.values():
            modules: list[Any] = [block.get_submodule(weight.name.removeprefix(prefix)) for weight in members]
            names = [weight.name for weight in members]
            refits = names[0] == unit.out_weight and self._refits(unit)
            train, held = self._moments(index, members[0], dense if refits else None, block, prefix)
            if refits:
                original: Any = dense.get_submodule(members[0].name.removeprefix(prefix))
                compressed = self._refit_and_compress(names[0], modules[0], original, train, held)
            else:
                moments = train.moments() if train else None
                compressed = self._compress(names, [linear.weight.detach() for linear in modules], moments)
            for name, linear, one in zip(names, modules, compressed, strict=True):
                linear.weight = nn.Parameter(one.dense(), requires_grad=False)
                stored |= one.tensors(name)
                if linear.bias is not None:
                    stored[f"{name}.bias"] = linear.bias.detach().to(torch.bfloat16)
        for name, _ in unit.kept:
            stored[name] = block.get_parameter(name.removeprefix(prefix)).detach().to(torch.bfloat16)
        for site in sites:
            name = self.layout.input_of(site)[0]
            order = stored_order(block.get_submodule(name.removeprefix(prefix)))
            if order is not None:
                stored[f"{name}.order"] = order
        return stored

    def _compress(self, names: Sequence[str], ws: Sequence[Tensor], moments: Moments | None) -> list[Compressed]:
        ranks = [self.plan.adapters.get(name, 0) for name in names]
        return self.method.compress(ws, moments, names, [self.plan.weights[name] for name in names], ranks)

    def _moments(
        self, index: int, weight: Weight, dense: nn.Module | None, block: nn.Module, prefix: str
    ) -> tuple[Accumulator | None, Accumulator]:
        """Moments of a site; with those of the `dense` half on the same inputs, split into train and held-out."""
        train, held = Accumulator(), Accumulator()
        if dense is None and not self.method.needs_moments:
            return None, held
        relative = weight.name.removeprefix(prefix)
        chunks = len(self.compressed)
        share = round(chunks * (1 - self.repair.held_out))
        boundary = chunks if dense is None else max(1, min(share, chunks - 1))  # one is held out, if there are two
        for at, chunk in enumerate(self.compressed):
            x_dense = None
            if dense is not None:
                with Tap({"x": dense.get_submodule(relative)}, stop_at="x") as seen:
                    self.stream.run(index, dense, chunk)
                x_dense = seen["x"]
            with Tap({"x": block.get_submodule(relative)}, stop_at="x") as seen:
                self.stream.run(index, block, chunk)
            (train if at < boundary else held).add(seen["x"], x_dense)
            if weight.name == self.layout.units[weight.unit].out_weight:
                self.inputs.append(seen["x"])
        return train, held

    def _refit_and_compress(
        self, name: str, linear: Any, original: Any, train: Accumulator | None, held: Accumulator  # noqa: ANN401
    ) -> list[Compressed]:  # fmt: skip
        assert train is not None
        w, bias = original.weight.detach(), None if original.bias is None else original.bias.detach()
        fitted = refit.refit(
            w,
            linear.weight.detach(),
            bias,
            train.moments(),
            held.moments() if held.count else train.moments(),
            self.repair,
        )
        both = train.plus(held).moments() if held.count else train.moments()
        compressed = self._compress([name], [fitted.weight], both)
        linear.bias = nn.Parameter(refit.bias_for(w, compressed[0].dense(), bias, both), requires_grad=False)
        return compressed
