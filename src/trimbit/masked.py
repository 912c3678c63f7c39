"""The frozen model with two versions of every weight of its blocks, of which masks choose for each input channel.

Both versions stay packed and are dequantised where they are multiplied by. A product is linear in the mask,
y = ((1 - m) x_low) W_low^T + (m x_high) W_high^T, where x_low and x_high are the inputs as each format rounds them;
it is computed for masks of zeros and ones, and its gradient is that of this formula.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimbit.kernels.acts import round_activations
from trimbit.model.head import Judged, following, judge, logit_slices, loss_gradient
from trimbit.model.layout import Weight
from trimbit.model.load import materialize
from trimbit.model.stream import BlockStream, build_skeleton, products_in
from trimbit.precision import ActInt, ActRun
from trimbit.progress import Progress
from trimbit.quant.qtensor import QTensor
from trimbit.repair.tune import Original
from trimbit.runtime import set_module


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """A weight in both formats; its columns, and the runs of rounding, are in the site's `order`."""

    low: QTensor
    high: QTensor
    low_acts: ActInt | None
    high_acts: ActInt | None
    order: Int[Tensor, " cols"]


class MaskedLinear(nn.Module):
    """y = W x + b with W mixed of two versions by `mask`, [cols], in the original order of the channels."""

    def __init__(self, versions: Versions, bias: Tensor | None, compute: torch.dtype) -> None:
        super().__init__()
        self.versions = versions
        self.bias = bias
        self.compute = compute
        self.mask: Tensor | None = None

    def dense(self, version: QTensor) -> Float[Tensor, "rows cols"]:
        """A version in the type of the products."""
        return version.dequantize(self.compute)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """Round, mix and multiply."""
        assert self.mask is not None, "the masks were not set"
        y: Tensor = _MixedProduct.apply(x.to(self.compute), self.mask, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _MixedProduct(torch.autograd.Function):
    """The product, and its gradients straight through the rounding of the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, layer: MaskedLinear) -> Tensor:  # noqa: ANN401
        own = layer.versions
        x, high = x[..., own.order], mask[own.order] > 0.5
        ctx.layer = layer
        ctx.save_for_backward(x, high)
        w = torch.where(high, layer.dense(own.high), layer.dense(own.low))
        return torch.where(high, _rounded(x, own.high_acts), _rounded(x, own.low_acts)) @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        x, high = ctx.saved_tensors
        layer: MaskedLinear = ctx.layer
        own = layer.versions
        w_low = layer.dense(own.low)
        to_low = grad @ w_low
        more = grad @ (layer.dense(own.high) - w_low)  # the small difference, not one of two large products
        x_high = _rounded(x, own.high_acts)
        of_mask = (x_high * more).flatten(0, -2).sum(0, dtype=torch.float32)
        if own.low_acts != own.high_acts:
            of_mask += ((x_high - _rounded(x, own.low_acts)) * to_low).flatten(0, -2).sum(0, dtype=torch.float32)
        back = own.order.argsort()
        return torch.where(high, to_low + more, to_low)[..., back], of_mask[back], None


def _rounded(x: Tensor, acts: ActInt | None) -> Tensor:
    return x if acts is None else round_activations(x, (ActRun(count=x.shape[-1], precision=acts),))


class MaskedModel:
    """Losses of a model under masks by site, and their gradients."""

    def __init__(
        self, stream: BlockStream, versions: Callable[[Weight], Versions], rows: Int[Tensor, "rows length"],
        held_out: Int[Tensor, "held held_length"], original: Original, *, distil: bool, batch: int, checkpointing: bool,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.stream = stream
        self.layout = stream.layout
        self.rows = rows
        self.held_out = held_out
        self.original = original
        self.distil = distil
        self.batch = batch
        self.checkpointing = checkpointing
        self.model = build_skeleton(stream.checkpoint.config)
        self.blocks: nn.ModuleList = self.model.get_decoder().layers
        self.layers: dict[str, list[MaskedLinear]] = {}
        for index, block in enumerate(self.blocks):
            prefix = f"{self.layout.family.blocks}.{index}."
            materialize(block, stream.checkpoint, prefix, torch.float32)
            for weight in self.layout.weights.values():
                if weight.name.startswith(prefix):
                    old: Any = block.get_submodule(weight.name.removeprefix(prefix))
                    bias = None if old.bias is None else old.bias.detach().to(stream.compute)
                    layer = MaskedLinear(versions(weight), bias, stream.compute)
                    set_module(block, weight.name.removeprefix(prefix), layer)
                    self.layers.setdefault(weight.site, []).append(layer)
            stream.go_online(block, prefix)
            progress(index + 1, len(self.blocks))
        self.model.requires_grad_(requires_grad=False)

    def gradients(self, masks: Mapping[str, Tensor], step: int) -> tuple[float, dict[str, Tensor]]:
        """The loss of a step's rows, the mean over tokens, and its gradient for every mask."""
        drawn = [at % len(self.rows) for at in range(step * self.batch, (step + 1) * self.batch)]
        leaves = {site: mask.detach().requires_grad_() for site, mask in masks.items()}
        self._set(leaves)
        total, count = 0.0, self.batch * (self.rows.shape[1] - 1)
        for at in drawn:
            row = self.rows[at]
            with products_in(self.stream.compute):
                hidden = self._final(row[None])[0]
                taught = None
                if self.distil:
                    taught = logit_slices(self.original.head, self.model.config, self.original.hidden(row)[:-1])
                total += loss_gradient(self.original.head, self.model.config, hidden[:-1], row[1:], taught, count)
        return total, {site: leaf.grad for site, leaf in leaves.items() if leaf.grad is not None}

    @torch.no_grad()
    def damage(self, masks: Mapping[str, Tensor], rows: int | None = None) -> Judged:
        """KL to the original, and the loss, on the first rows that are learnt from; None: on the held-out ones."""
        self._set(masks)
        found = []
        for row in self.held_out if rows is None else self.rows[:rows]:
            with products_in(self.stream.compute):
                own = logit_slices(self.original.head, self.model.config, self._final(row[None])[0])
                taught = logit_slices(self.original.head, self.model.config, self.original.hidden(row))
                found.append(judge((torch.log_softmax(logits, -1) for _, logits in taught), own, following(row[None])))
        return Judged(*(sum(each) / len(found) for each in zip(*found, strict=True)))

    def _set(self, masks: Mapping[str, Tensor]) -> None:
        for site, layers in self.layers.items():
            for layer in layers:
                layer.mask = masks[site]

    def _final(self, tokens: Int[Tensor, "rows length"]) -> Float[Tensor, "rows length hidden"]:
        """What the head reads; the residual stream is fp32."""
        hidden = self.stream.embed(tokens)
        for index, block in enumerate(self.blocks):
            run = partial(self.stream.forward, index, block)
            again = self.checkpointing and torch.is_grad_enabled()
            hidden = checkpoint(run, hidden, use_reentrant=False) if again else run(hidden)
        return self.stream.norm(hidden)  # type: ignore[no-any-return]
