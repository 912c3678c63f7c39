"""The model under masks: its losses, and their gradients."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimbit.calibrate.teacher import Teacher
from trimbit.errors import NumericsError
from trimbit.jobs.progress import Progress
from trimbit.model.checkpoint.open import materialize
from trimbit.model.forward.absent import set_module
from trimbit.model.forward.compute import native, products_in
from trimbit.model.forward.logits import (
    Divergence,
    Head,
    Logits,
    compare_logits,
    following,
    log_softmax,
    logit_slices,
    loss_gradient,
)
from trimbit.model.forward.stream import BlockStream, block_arguments, build_skeleton, run_block
from trimbit.search.two_formats.config import MaskedSearch, MaskTraining
from trimbit.trial.masked.cuda_graphs import Block, recorded, replay
from trimbit.trial.masked.layers import Layers

if TYPE_CHECKING:
    from trimbit.trial.masked.inputs import MaskedLinear


class Background(NamedTuple):
    """The masks around which others are tried, each row's inputs of blocks, and the original's log-probabilities."""

    masks: Mapping[str, Tensor]
    before: list[list[Tensor]]  # and the last block's output
    log_ps: list[list[Tensor]]  # in fp16, which adds less than 1e-5 nats


class MaskedModel:
    """Losses of a model under masks by site, and their gradients."""

    def __init__(
        self, stream: BlockStream, layers: Layers, rows: Int[Tensor, "rows length"],
        held_out: Int[Tensor, "held held_length"], original: Teacher, config: MaskedSearch, progress: Progress,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.rows = rows
        self.held_out = held_out
        self.original = original
        self.device = device
        self.distil, self.batch, self.checkpointing = False, 1, False
        self.cuda_graphs = config.cuda_graphs(self.device.type)
        if isinstance(config, MaskTraining):
            self.distil, self.batch, self.checkpointing = config.loss == "kl", config.batch, config.checkpointing
        self.compute = native(stream.compute, self.device.type)
        self.layers: dict[str, list[MaskedLinear]] = {}  # by site
        self.block_of: dict[str, int] = {}  # of each site
        self.model = build_skeleton(stream.checkpoint.config, stream.compute)
        self._materialize(stream, layers, progress)
        nn.Module.to(self.model, self.device).requires_grad_(requires_grad=False)
        self.blocks: nn.ModuleList = self.model.get_decoder().layers
        self.sites_of: list[list[str]] = [[] for _ in self.blocks]
        for site, index in self.block_of.items():
            self.sites_of[index].append(site)
        self.norm = self.model.get_submodule(stream.layout.family.final_norm)
        self.head: Head = self.model.get_output_embeddings()
        self.arguments: dict[int, list[dict[str, Any]]] = {}  # by the length of a row
        self.recorded: dict[int, Sequence[Block]] = {}  # likewise
        self.backgrounds: dict[int, Background] = {}  # by the number of rows

    def _materialize(self, stream: BlockStream, layers: Layers, progress: Progress) -> None:
        """Load the weights, block by block, with a masked layer in place of each linear layer."""
        layout, checkpoint = stream.layout, stream.checkpoint
        for index in range(layout.blocks):
            name = f"{layout.family.blocks}.{index}"
            materialize(self.model.get_submodule(name), checkpoint, f"{name}.", torch.float32)
            for weight in layout.weights.values():
                if weight.name.startswith(f"{name}."):
                    old: Any = self.model.get_submodule(weight.name)
                    bias = None if old.bias is None else old.bias.detach().to(self.compute)
                    known = self.layers.setdefault(weight.site, [])
                    inputs = known[0].inputs if known else layers.inputs(weight, self.compute)
                    known.append(layers.linear(weight, inputs, bias))
                    self.block_of[weight.site] = index
                    set_module(self.model, weight.name, known[-1])
            progress(index + 1, layout.blocks)
        family = layout.family
        ends = (family.embed,) if layout.tied else (family.embed, family.head)
        for name, dtype in ((family.final_norm, torch.float32), *((end, self.compute) for end in ends)):
            materialize(self.model.get_submodule(name), checkpoint, f"{name}.", dtype)
        if layout.tied:
            self.model.tie_weights()
        stream.go_online(self.model)

    def gradients(
        self, masks: Mapping[str, Tensor], step: int, generator: torch.Generator
    ) -> tuple[float, dict[str, Tensor]]:
        """The mean loss over the tokens of a step's rows, and its gradient for every mask; noise differs by row."""
        drawn = [at % len(self.rows) for at in range(step * self.batch, (step + 1) * self.batch)]
        leaves = {site: mask.detach().to(self.device).requires_grad_() for site, mask in masks.items()}
        for leaf in leaves.values():
            leaf.grad = torch.zeros_like(leaf)  # else it would be the graph's memory, which the next row overwrites
        self._set(leaves)
        total, count = 0.0, self.batch * (self.rows.shape[1] - 1)
        for at in drawn:
            row = self.rows[at]
            self._draw(generator)
            with products_in(self.compute, self.device.type):
                replay = partial(self._replay, masks=leaves, generator=generator)
                hidden = self._final(row, replay if self.cuda_graphs else self._run)[:-1]
                taught = self._taught(row, slice(-1)) if self.distil else None
                labels = row[1:].to(self.device)
                total += loss_gradient(self.head, self.model.config, hidden, labels, taught, count)
        return total, {site: leaf.grad.to(masks[site]) for site, leaf in leaves.items() if leaf.grad is not None}

    @torch.no_grad()
    def damage(self, masks: Mapping[str, Tensor], rows: int | None = None) -> Divergence:
        """KL to the original, and the loss, on the first `rows` training rows; None: on the held-out rows.

        The first masks tried on some rows are the background of later ones, which are run only from the first block
        whose masks differ. Noise differs by row, and is the same at each call.

        Raises:
            NumericsError: if the KL or the loss is not finite.
        """
        own = {site: mask.to(self.device) for site, mask in masks.items()}
        with products_in(self.compute, self.device.type):
            found = self._held_out(own) if rows is None else self._around(self._background(own, rows), own)
        divergence = Divergence(*(sum(each) / len(found) for each in zip(*found, strict=True)))
        if not all(map(math.isfinite, divergence)):
            raise NumericsError(f"the model under masks is not finite: KL {divergence.kl}, loss {divergence.nll}")
        return divergence

    def _held_out(self, masks: Mapping[str, Tensor]) -> list[Divergence]:
        self._set(masks)
        found = []
        for at, row in enumerate(self.held_out):
            self._draw(torch.Generator().manual_seed(at))
            found.append(self._judged(row, self._run(self._embedded(row)), self._log_ps(row)))
        return found

    def _around(self, seen: Background, masks: Mapping[str, Tensor]) -> list[Divergence]:
        self._set(masks)
        others = (self.block_of[site] for site, mask in masks.items() if not torch.equal(mask, seen.masks[site]))
        start = min(others, default=len(self.blocks))
        found = []
        for at, (before, log_ps) in enumerate(zip(seen.before, seen.log_ps, strict=True)):
            self._draw(torch.Generator().manual_seed(at))
            hidden = self._run(before[start], start)
            found.append(self._judged(self.rows[at], hidden, (log_p.float() for log_p in log_ps)))
        return found

    def _background(self, masks: Mapping[str, Tensor], rows: int) -> Background:
        if rows not in self.backgrounds:
            self._set(masks)
            before: list[list[Tensor]] = [[] for _ in range(rows)]
            for at, kept in enumerate(before):
                self._draw(torch.Generator().manual_seed(at))
                kept.append(self._run(self._embedded(self.rows[at]), keep=kept))
            log_ps = [[log_p.half() for log_p in self._log_ps(row)] for row in self.rows[:rows]]
            self.backgrounds[rows] = Background(masks, before, log_ps)
        return self.backgrounds[rows]

    def _judged(self, row: Int[Tensor, " length"], hidden: Tensor, log_ps: Iterable[Tensor]) -> Divergence:
        logits = logit_slices(self.head, self.model.config, self.norm(hidden)[0])
        return compare_logits(log_ps, logits, following(row[None]).to(self.device))

    def _log_ps(self, row: Int[Tensor, " length"]) -> Iterator[Tensor]:
        return (log_softmax(logits) for _, logits in self._taught(row, slice(None)))

    def _taught(self, row: Int[Tensor, " length"], part: slice) -> Logits:
        return logit_slices(self.head, self.model.config, self.original.hidden(row)[part].to(self.device, self.compute))

    def _set(self, masks: Mapping[str, Tensor]) -> None:
        for site, layers in self.layers.items():
            layers[0].inputs.mask = masks[site]

    def _draw(self, generator: torch.Generator) -> None:
        """Draw new noise for all layers."""
        for layers in self.layers.values():
            for layer in layers:
                layer.draw(generator)

    def _final(
        self, row: Int[Tensor, " length"], run: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "length hidden"]:
        """The head's input."""
        return self.norm((run or self._run)(self._embedded(row)))[0]  # type: ignore[no-any-return]

    def _embedded(self, row: Int[Tensor, " length"]) -> Float[Tensor, "1 length hidden"]:
        """The residual stream, which is fp32, before the first block."""
        return self.model.get_input_embeddings()(row[None].to(self.device)).float()  # type: ignore[no-any-return]

    def _run(
        self, hidden: Float[Tensor, "1 length hidden"], start: int = 0, keep: list[Tensor] | None = None
    ) -> Float[Tensor, "1 length hidden"]:
        """The stream after the last block, given that before block `start`; `keep` collects the blocks' inputs."""
        for index in range(start, len(self.blocks)):
            if keep is not None:
                keep.append(hidden)
            run = self._block(index, hidden.shape[1])
            again = self.checkpointing and torch.is_grad_enabled()
            hidden = checkpoint(run, hidden, use_reentrant=False) if again else run(hidden)
        return hidden

    def _replay(
        self, hidden: Float[Tensor, "1 length hidden"], masks: Mapping[str, Tensor], generator: torch.Generator
    ) -> Float[Tensor, "1 length hidden"]:
        """As `_run` from the first block, with each block one CUDA graph, and noise from `generator`."""
        length, each = hidden.shape[1], [[masks[site] for site in sites] for sites in self.sites_of]
        if length not in self.recorded:
            blocks = [self._masked_block(index, length) for index in range(len(self.blocks))]
            self.recorded[length] = recorded(blocks, hidden, each)
        return replay(self.recorded[length], hidden, each, int(torch.randint(2**62, (), generator=generator)))

    def _masked_block(self, index: int, length: int) -> Block:
        def run(hidden: Tensor, *masks: Tensor) -> Tensor:
            for site, mask in zip(self.sites_of[index], masks, strict=True):
                self.layers[site][0].inputs.mask = mask
            return self._block(index, length)(hidden)

        return run

    def _block(self, index: int, length: int) -> Callable[[Tensor], Tensor]:
        if length not in self.arguments:
            self.arguments[length] = block_arguments(self.model, 1, length)
        return partial(run_block, self.blocks[index], self.arguments[length][index])
