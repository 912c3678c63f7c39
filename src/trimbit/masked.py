"""The frozen model with two versions of every weight of its blocks, of which masks choose for each input channel.

Both versions stay packed, and are dequantised where they are multiplied by, or are kept dense. A product is linear
in the mask, y = ((1 - m) x_low) W_low^T + (m x_high) W_high^T, where x_low and x_high are the inputs as each
format rounds them; it is computed for masks of zeros and ones, and its gradient is that of this formula.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimbit.candidates import CandidateWeights
from trimbit.kernels.acts import round_among, take_channels
from trimbit.model.head import Head, Judged, Logits, following, judge, logit_slices, loss_gradient
from trimbit.model.layout import Weight
from trimbit.model.load import materialize
from trimbit.model.products import products_in
from trimbit.model.stream import BlockStream, block_arguments, build_skeleton, run_block
from trimbit.precision import ActInt
from trimbit.progress import Progress
from trimbit.quant.qtensor import QTensor
from trimbit.repair.tune import Original
from trimbit.runtime import Packed, set_module
from trimbit.search.mixed import Masking


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """A weight in both formats; its columns are in the site's `order`."""

    low: QTensor
    high: QTensor
    low_acts: ActInt | None
    high_acts: ActInt | None
    order: Int[Tensor, " cols"]
    dense: bool  # while masks are tried


def both_versions(
    candidates: CandidateWeights, config: Masking, orders: Mapping[str, Tensor], weight: Weight
) -> Versions:
    """A weight in both formats; the candidates' columns are in `orders`, by site."""
    low, high = (candidates.compressed(weight, precision).packed for precision in (config.low, config.high))
    order, acts = orders[weight.site], {"low_acts": config.low_acts, "high_acts": config.high_acts}
    return Versions(low=low, high=high, **acts, order=order, dense=config.dense)


def of_length(rows: Int[Tensor, "rows length"], length: int) -> Int[Tensor, "pieces piece"]:
    """Rows cut into pieces of this length; what is left of each is not used."""
    whole = rows.shape[1] // length * length
    return rows[:, :whole].reshape(-1, length)


class Inputs(nn.Module):
    """A site's inputs as each version rounds them.

    The channels of a version are rounded as they are once stored: in groups of their own, along the order of the
    versions' columns. The weights of the site read one tensor, one after the other: it is rounded for the first of
    them, and kept until the last. Both are the input itself where neither is rounded.
    """

    order: Tensor
    back: Tensor

    def __init__(self, versions: Versions, compute: torch.dtype) -> None:
        super().__init__()
        self.acts = versions.low_acts, versions.high_acts
        self.compute = compute
        self.register_buffer("order", versions.order)
        self.register_buffer("back", versions.order.argsort())
        self.mask: Tensor | None = None  # [cols], in the original order
        self.readers = self.left = 0
        self.last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Float[Tensor, "*batch cols"]) -> tuple[Tensor, Tensor]:
        """For the low version, and for the high one."""
        if self.last is None or self.last[0] is not x:
            assert self.mask is not None, "the masks were not set"
            plain, chosen = x.detach().to(self.compute), self.mask.detach() > 0.5
            low, high = (
                self._rounded(plain, acts, own) for acts, own in zip(self.acts, (~chosen, chosen), strict=True)
            )
            self.last, self.left = (x, (low, high)), self.readers
        found = self.last[1]
        self.left -= 1
        if not self.left:
            self.last = None
        return found

    def _rounded(self, x: Tensor, acts: ActInt | None, counted: Tensor) -> Tensor:
        if acts is None:
            return x
        return take_channels(round_among(take_channels(x, self.order), acts, counted[self.order]), self.back)


class Version(nn.Module):
    """One version of a weight, whose columns are stored in the site's order."""

    kept: Tensor | None

    def __init__(self, packed: QTensor, inputs: Inputs, dense: bool) -> None:
        super().__init__()
        self.packed: Packed | None = Packed.of(packed)
        self.inputs = inputs
        self.register_buffer("kept", None)
        if dense:
            self.kept, self.packed = self.dense(inputs.compute), None

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
        """The matrix, its channels in their original order."""
        if self.kept is not None:
            return self.kept.to(dtype)
        assert self.packed is not None
        return take_channels(self.packed.dense(dtype), self.inputs.back)


class MaskedLinear(nn.Module):
    """y = W x + b with W mixed of two versions by the mask of its inputs."""

    bias: Tensor | None

    def __init__(self, versions: Versions, inputs: Inputs, bias: Tensor | None) -> None:
        super().__init__()
        self.inputs = inputs
        inputs.readers += 1
        self.low, self.high = (Version(own, inputs, versions.dense) for own in (versions.low, versions.high))
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """Round, mix and multiply."""
        y: Tensor = _MixedProduct.apply(x, *self.inputs(x), self.inputs.mask, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _MixedProduct(torch.autograd.Function):
    """The product of the rounded inputs; gradients pass to the input straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, mask: Tensor, layer: MaskedLinear) -> Tensor:  # noqa: ANN401
        chosen = mask > 0.5
        ctx.layer, ctx.dtype, ctx.alike = layer, x.dtype, low is high
        ctx.save_for_backward(low, high, chosen)
        w = torch.where(chosen, layer.high.dense(low.dtype), layer.low.dense(low.dtype))
        return (low if ctx.alike else torch.where(chosen, high, low)) @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor, None]:  # noqa: ANN401
        low, high, chosen = ctx.saved_tensors
        layer: MaskedLinear = ctx.layer
        w_low = layer.low.dense(grad.dtype)
        to_low = grad @ w_low
        more = grad @ (layer.high.dense(grad.dtype) - w_low)  # the small difference, not one of two large products
        of_mask = (high * more).flatten(0, -2).sum(0, dtype=torch.float32)
        if not ctx.alike:
            of_mask += ((high - low) * to_low).flatten(0, -2).sum(0, dtype=torch.float32)
        of_x = torch.where(chosen, to_low + more, to_low).to(ctx.dtype)
        return of_x, None, None, of_mask, None


class Background(NamedTuple):
    """Masks that others are tried around: by row what lies before each block, and the original's log-probabilities."""

    masks: Mapping[str, Tensor]
    before: list[list[Tensor]]  # and behind the last one
    log_ps: list[list[Tensor]]  # in fp16, which adds less than 1e-5 nats


class MaskedModel:
    """Losses of a model under masks by site, and their gradients; on a GPU where there is one."""

    def __init__(
        self, stream: BlockStream, versions: Callable[[Weight], Versions], rows: Int[Tensor, "rows length"],
        held_out: Int[Tensor, "held held_length"], original: Original, config: Masking, progress: Progress,
    ) -> None:  # fmt: skip
        self.compute = stream.compute
        self.rows = rows
        self.held_out = held_out
        self.original = original
        self.distil = config.loss == "kl"
        self.batch = config.batch
        self.checkpointing = config.checkpointing
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.layers: dict[str, list[MaskedLinear]] = {}  # by site
        self.block_of: dict[str, int] = {}  # of each site
        self.model = build_skeleton(stream.checkpoint.config)
        self._materialize(stream, versions, progress)
        nn.Module.to(self.model, self.device).requires_grad_(requires_grad=False)
        self.blocks: nn.ModuleList = self.model.get_decoder().layers
        self.norm = self.model.get_submodule(stream.layout.family.final_norm)
        self.head: Head = self.model.get_output_embeddings()
        self.arguments: dict[int, list[dict[str, Any]]] = {}  # by the length of a row
        self.backgrounds: dict[int, Background] = {}  # by the number of rows

    def _materialize(self, stream: BlockStream, versions: Callable[[Weight], Versions], progress: Progress) -> None:
        """Take the weights in, block by block, and both versions in the place of each linear one."""
        layout, checkpoint = stream.layout, stream.checkpoint
        for index in range(layout.blocks):
            name = f"{layout.family.blocks}.{index}"
            materialize(self.model.get_submodule(name), checkpoint, f"{name}.", torch.float32)
            for weight in layout.weights.values():
                if weight.name.startswith(f"{name}."):
                    old: Any = self.model.get_submodule(weight.name)
                    bias = None if old.bias is None else old.bias.detach().to(stream.compute)
                    own, known = versions(weight), self.layers.setdefault(weight.site, [])
                    inputs = known[0].inputs if known else Inputs(own, stream.compute)
                    known.append(MaskedLinear(own, inputs, bias))
                    self.block_of[weight.site] = index
                    set_module(self.model, weight.name, known[-1])
            progress(index + 1, layout.blocks)
        family = layout.family
        tables = (family.embed,) if layout.tied else (family.embed, family.head)
        for name, dtype in ((family.final_norm, torch.float32), *((table, stream.compute) for table in tables)):
            materialize(self.model.get_submodule(name), checkpoint, f"{name}.", dtype)
        if layout.tied:
            self.model.tie_weights()
        stream.go_online(self.model)

    def gradients(self, masks: Mapping[str, Tensor], step: int) -> tuple[float, dict[str, Tensor]]:
        """The loss of a step's rows, the mean over tokens, and its gradient for every mask."""
        drawn = [at % len(self.rows) for at in range(step * self.batch, (step + 1) * self.batch)]
        leaves = {site: mask.detach().to(self.device).requires_grad_() for site, mask in masks.items()}
        self._set(leaves)
        total, count = 0.0, self.batch * (self.rows.shape[1] - 1)
        for at in drawn:
            row = self.rows[at]
            with products_in(self.compute, self.device.type):
                hidden = self._final(row)[:-1]
                taught = self._taught(row, slice(-1)) if self.distil else None
                labels = row[1:].to(self.device)
                total += loss_gradient(self.head, self.model.config, hidden, labels, taught, count)
        return total, {site: leaf.grad.to(masks[site]) for site, leaf in leaves.items() if leaf.grad is not None}

    @torch.no_grad()
    def damage(self, masks: Mapping[str, Tensor], rows: int | None = None) -> Judged:
        """KL to the original, and the loss, on the first rows that are learnt from; None: on the held-out ones.

        The first masks that are tried on some rows are the background of those that follow, which are run from the
        first block on whose masks are others.
        """
        own = {site: mask.to(self.device) for site, mask in masks.items()}
        with products_in(self.compute, self.device.type):
            if rows is None:
                self._set(own)
                found = [self._judged(row, self._run(self._embedded(row)), self._log_ps(row)) for row in self.held_out]
            else:
                seen = self._background(own, rows)
                self._set(own)
                others = (self.block_of[site] for site, mask in own.items() if not torch.equal(mask, seen.masks[site]))
                start = min(others, default=len(self.blocks))
                found = [
                    self._judged(row, self._run(before[start], start), (log_p.float() for log_p in log_ps))
                    for row, before, log_ps in zip(self.rows[:rows], seen.before, seen.log_ps, strict=True)
                ]
        return Judged(*(sum(each) / len(found) for each in zip(*found, strict=True)))

    def _background(self, masks: Mapping[str, Tensor], rows: int) -> Background:
        if rows not in self.backgrounds:
            self._set(masks)
            before: list[list[Tensor]] = [[] for _ in range(rows)]
            for row, kept in zip(self.rows[:rows], before, strict=True):
                kept.append(self._run(self._embedded(row), keep=kept))
            log_ps = [[log_p.half() for log_p in self._log_ps(row)] for row in self.rows[:rows]]
            self.backgrounds[rows] = Background(masks, before, log_ps)
        return self.backgrounds[rows]

    def _judged(self, row: Int[Tensor, " length"], hidden: Tensor, log_ps: Iterable[Tensor]) -> Judged:
        logits = logit_slices(self.head, self.model.config, self.norm(hidden)[0])
        return judge(log_ps, logits, following(row[None]).to(self.device))

    def _log_ps(self, row: Int[Tensor, " length"]) -> Iterator[Tensor]:
        return (torch.log_softmax(logits, -1) for _, logits in self._taught(row, slice(None)))

    def _taught(self, row: Int[Tensor, " length"], part: slice) -> Logits:
        return logit_slices(self.head, self.model.config, self.original.hidden(row)[part].to(self.device))

    def _set(self, masks: Mapping[str, Tensor]) -> None:
        for site, layers in self.layers.items():
            layers[0].inputs.mask = masks[site]

    def _final(self, row: Int[Tensor, " length"]) -> Float[Tensor, "length hidden"]:
        """What the head reads."""
        return self.norm(self._run(self._embedded(row)))[0]  # type: ignore[no-any-return]

    def _embedded(self, row: Int[Tensor, " length"]) -> Float[Tensor, "1 length hidden"]:
        """The residual stream, which is fp32, before the first block."""
        return self.model.get_input_embeddings()(row[None].to(self.device)).float()  # type: ignore[no-any-return]

    def _run(
        self, hidden: Float[Tensor, "1 length hidden"], start: int = 0, keep: list[Tensor] | None = None
    ) -> Float[Tensor, "1 length hidden"]:
        """The stream behind the last block, from the one before block `start` on; `keep` gets those between."""
        length = hidden.shape[1]
        if length not in self.arguments:
            self.arguments[length] = block_arguments(self.model, 1, length)
        for index in range(start, len(self.blocks)):
            if keep is not None:
                keep.append(hidden)
            run = partial(run_block, self.blocks[index], self.arguments[length][index])
            again = self.checkpointing and torch.is_grad_enabled()
            hidden = checkpoint(run, hidden, use_reentrant=False) if again else run(hidden)
        return hidden
