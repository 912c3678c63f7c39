"""Small pieces of a job, timed on the opened model; a dry run multiplies each by how often it will run.

A piece runs the job's code on the weights of a block and random tokens. It is timed once, when it is first asked for:
the best of a few runs counts, and the first warms up. Seconds are for this machine in its present state.
"""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimbit.calibrate.gradients import Gradient, coupled
from trimbit.calibrate.moments import Accumulator, Moments
from trimbit.calibrate.roomy_cache import roomy_cache
from trimbit.calibrate.sample import PREFILL_TOKENS, draw, read
from trimbit.measure.criteria.mutual_information import information
from trimbit.model.checkpoint.open import materialize
from trimbit.model.forward.attention import grouped
from trimbit.model.forward.compute import computing, products_in
from trimbit.model.forward.logits import LOGIT_TOKENS, Head, kl, log_softmax, logit_slices, loss_gradient
from trimbit.model.forward.stream import CHUNK_TOKENS, block_arguments, build_skeleton, run_block
from trimbit.model.layout import Unit
from trimbit.pipeline.job import Job
from trimbit.schema.precision import Int, Precision, Run
from trimbit.search.solvers.knapsack import Config as Solver
from trimbit.search.solvers.knapsack import knapsack
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.repair import refit

FEW, MANY = 8, 800_000  # compressed weights: rows of the small one, elements of the large one
TOGETHER = 512  # tokens, but at least a row, run through a block in memory
SAMPLED_BLOCKS = 2  # blocks used in timing the sampling; the others take as long
READ_ROWS = 4  # rows read in timing the reading of past tokens
ROUNDED = (512, 1024)  # shape of the weight that is rounded to nearest
ITEMS = 24  # choices of each unit in the knapsack
SAMPLES = 2048  # for the estimate of information


def best_of(times: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


class Pieces:
    """Seconds of the pieces of one job."""

    def __init__(self, job: Job) -> None:
        self.job, self.layout, self.stream = job, job.layout, job.stream
        self.compute, self.device = job.stream.compute, job.stream.device
        self._known: dict[tuple[object, ...], float] = {}
        self._h: dict[int, Moments] = {}  # by number of channels

    def _once(self, key: tuple[object, ...], work: Callable[[], object], times: int = 3) -> float:
        if key not in self._known:
            self._known[key] = best_of(times, work)
        return self._known[key]

    @cached_property
    def block(self) -> nn.Module:
        """The first block, as loaded for streaming."""
        return self.stream.load(0)

    @cached_property
    def head(self) -> Head:
        """The original's head."""
        return self.stream.head()

    def hidden(self, rows: int, length: int) -> Tensor:
        """The first block's input for random tokens."""
        generator = torch.Generator().manual_seed(0)
        return self.stream.embed(torch.randint(self.layout.sizes["vocab"], (rows, length), generator=generator))

    def load(self) -> float:
        """Reading a block from the checkpoint."""
        return self._once(("load",), lambda: self.stream.load(0))

    def streamed(self, length: int) -> float:
        """A token through a block, where rows of `length` are streamed in chunks."""
        x = self.hidden(max(1, CHUNK_TOKENS // length), length)
        return self._once(("streamed", length), lambda: self.stream.run(0, self.block, x)) / (x.shape[0] * length)

    def in_memory(self, rows: int, length: int) -> float:
        """A token through a block in memory; a few rows are timed, since more take as long per token."""
        rows = min(rows, max(1, TOGETHER // length))
        block, x = self.stream.load(0).to(self.compute), self.hidden(rows, length)
        own = block_arguments(self.stream.skeleton, rows, length)[0]

        def run() -> None:
            with computing(self.compute, self.device.type):
                run_block(block, own, x)

        return self._once(("in memory", rows, length), run) / (rows * length)

    def _slice(self) -> Tensor:
        return self.stream.final_norm(self.hidden(1, LOGIT_TOKENS))[0]

    def _log_softmax(self) -> Tensor:
        with computing(self.compute, self.device.type):
            ((_, logits),) = logit_slices(self.head, self.layout.config, self._slice())
            return log_softmax(logits)

    def logits(self) -> float:
        """The log-probabilities of a token."""
        return self._once(("logits",), self._log_softmax, 2) / LOGIT_TOKENS

    def divergence(self) -> float:
        """The KL of a token from known probabilities."""
        log_p = self._slice().new_zeros(LOGIT_TOKENS, self.layout.sizes["vocab"])
        return self._once(("kl",), lambda: kl(log_p, log_p), 2) / LOGIT_TOKENS

    def head_gradient(self) -> float:
        """A token's loss, from the last hidden state, and the gradient back to it."""
        labels = torch.zeros(LOGIT_TOKENS, dtype=torch.long, device=self.device)

        def run() -> None:
            with products_in(self.compute, self.device.type):
                leaf = self._slice().requires_grad_() * 1.0
                loss_gradient(self.head, self.layout.config, leaf, labels, None, LOGIT_TOKENS)

        return self._once(("head gradient",), run, 2) / LOGIT_TOKENS

    def gram(self, cols: int) -> float:
        """Adding a token to the second moments of a site."""
        x = torch.randn(CHUNK_TOKENS, cols, device=self.device)
        total = Accumulator()
        return self._once(("gram", cols), lambda: total.add(x)) / CHUNK_TOKENS

    def _moments(self, cols: int) -> Moments:
        if cols not in self._h:
            x = torch.randn(cols + cols // 4, cols, generator=torch.Generator().manual_seed(0)).to(self.device)
            total = Accumulator()
            total.add(x)
            found = total.moments()
            self._h[cols] = replace(found, cross=found.h, dense_mean=found.mean)
        return self._h[cols]

    def compress(self, cols: int, elements: int, formats: tuple[Precision, ...]) -> float:
        """Compressing weights that read one site in one call; `elements` counts all formats together."""
        kinds = {
            f"{type(p).__name__} {getattr(p, 'symmetric', '')}": p for p in formats
        }  # bits and groups do not change the time
        menu, formats = tuple(kinds), tuple(kinds.values())

        def compress(rows: int) -> None:
            ws = [torch.randn(max(1, rows // len(formats)), cols, device=self.device) for _ in formats]
            runs: list[tuple[Run, ...]] = [(Run(count=cols, precision=p),) for p in formats]
            rank = min(self.job.rank, len(ws[0]))
            self.job.compressor.compress(ws, self._moments(cols), list(menu), runs, [rank] * len(ws))

        most = max(weight.rows * weight.cols for weight in self.layout.weights.values())
        many = max(2 * FEW, min(MANY, most) // cols)
        fixed = self._once(("compress", cols, FEW, menu), lambda: compress(FEW), 2)
        whole = self._once(("compress", cols, many, menu), lambda: compress(many), 1)
        return fixed + max(whole - fixed, 0.0) * elements / (many * cols)

    def dequantize(self, precision: Precision) -> float:
        """Putting an element of a candidate into the model."""
        weight = self.layout.weights[self.layout.units["blocks.0.mlp"].weights[0]]
        w = torch.randn(weight.rows, weight.cols, device=self.device)
        runs = (Run(count=weight.cols, precision=precision),)
        rank = min(self.job.rank, weight.rows, weight.cols)
        moments = self._moments(weight.cols) if self.job.compressor.needs_moments else None
        (made,) = self.job.compressor.compress([w], moments, [weight.name], [runs], [rank])
        return self._once(("dequantize", precision.name), lambda: made.dense(torch.bfloat16)) / w.numel()

    def refit(self, unit: Unit, width: int, ridges: int) -> float:
        """The refit of a cut sub-block's output weight."""
        assert unit.out_weight is not None
        weight = self.layout.weights[unit.out_weight]
        cols = self.layout.weight_shape(weight, width)[1]
        config, w = refit.Config(ridges=(0.1,) * ridges), torch.randn(weight.rows, weight.cols, device=self.device)
        full, index = self._moments(weight.cols), torch.arange(cols)
        kept = full.at(index)
        return self._once(
            ("refit", weight.cols, cols, ridges), lambda: refit.refit(w, w[:, index], None, kept, kept, config), 1
        )

    def sampling(self, rows: int, length: int) -> tuple[float, float]:
        """Drawing one token for each of `rows` rows at half their length; and reading one past token again."""
        key = ("read", rows, length)
        if key not in self._known:
            self._known[("draw", rows, length)], self._known[key] = self._sampled(rows, length)
        return self._known[("draw", rows, length)], self._known[key]

    def _sampled(self, rows: int, length: int) -> tuple[float, float]:
        original, family = self.job.sampled, self.layout.family
        model = build_skeleton(original.checkpoint.config, original.compute)
        decoder, some = model.get_decoder(), min(SAMPLED_BLOCKS, self.layout.blocks)
        decoder.layers = blocks = decoder.layers[:some]  # the others stay without data
        for name in (*(f"{family.blocks}.{at}" for at in range(some)), family.embed, family.final_norm):
            materialize(model.get_submodule(name), original.checkpoint, f"{name}.", original.compute)
        if self.layout.tied:
            model.tie_weights()
        else:
            materialize(model.get_submodule(family.head), original.checkpoint, f"{family.head}.", original.compute)
        original.go_online(model)
        nn.Module.to(model, self.job.whole_device)
        with grouped(model):
            return self._drawn(model, blocks, rows, length)

    def _drawn(self, model: PreTrainedModel, blocks: nn.ModuleList, rows: int, length: int) -> tuple[float, float]:
        """Of a model of some blocks, and without them."""
        decoder, some = model.get_decoder(), len(blocks)
        column, generator = torch.zeros(rows, dtype=torch.long), torch.Generator().manual_seed(0)
        part = torch.zeros(min(rows, READ_ROWS), min(PREFILL_TOKENS, length), dtype=torch.long)
        decoder.layers = nn.ModuleList()
        alone = best_of(3, lambda: draw(model, column, roomy_cache(), generator))
        alone_read = best_of(2, lambda: read(model, part))
        decoder.layers = blocks
        past = roomy_cache()
        draw(model, column, past, generator)
        layers: Any = past.layers[:some]
        for index, layer in enumerate(layers):
            shape = (*layer.keys.shape[:2], max(1, length // 2), layer.keys.shape[3])
            with torch.inference_mode():
                past.update(layer.keys.new_zeros(shape), layer.values.new_zeros(shape), index)
        all_blocks = self.layout.blocks / some
        drawn = alone + all_blocks * max(best_of(4, lambda: draw(model, column, past, generator)) - alone, 0.0)
        reads = alone_read + all_blocks * max(best_of(2, lambda: read(model, part)) - alone_read, 0.0)
        return drawn, reads / part.numel()

    def gradient(self, rows: int, length: int, *, weights: bool) -> float:
        """A token forward and back through a block, with the gradients of its input and, if asked, its weights."""
        block, x = self.stream.load(0).requires_grad_(requires_grad=False), self.hidden(rows, length)
        own = [p.requires_grad_() for p in block.parameters() if p.dim() > 1] if weights else []

        def run() -> None:
            leaf = x.detach().requires_grad_()
            with torch.enable_grad(), products_in(self.compute, self.device.type):
                out = self.stream.forward(0, block, leaf)
                torch.autograd.grad(out, [leaf, *own], x)

        return self._once(("gradient", rows, length, weights), run) / (rows * length)

    def score(self) -> float:
        """Scoring a block's channels and heads by the recipe's criterion."""
        assert self.job.steps.criterion is not None
        module, config = self.job.steps.criterion
        units = [unit for unit in self.layout.units.values() if unit.block == 0 and unit.dim is not None]
        names = [name for unit in units for name in unit.weights]
        w = {name: self.job.checkpoint.tensor(f"{name}.weight").to(self.device, torch.float32) for name in names}
        if module.READS == "moments":
            moments = {self.layout.weights[name].cols: self._moments(self.layout.weights[name].cols) for name in names}

        def run() -> None:
            for unit in units:
                if module.READS == "moments":
                    out = self.layout.weights[unit.out_weight or ""]
                    module.score(w[out.name], moments[out.cols], out.cols // unit.size, config)
                else:
                    found = {name: Gradient(w=w[name], g=w[name], fisher=w[name]) for name in unit.weights}
                    module.score(coupled(self.layout, unit, found), unit.size, config)

        return self._once(("score",), run, 1)

    def rounding(self) -> float:
        """Rounding an element to nearest."""
        runs, w = (
            (Run(count=ROUNDED[1], precision=Int(bits=3, group=128, symmetric=True)),),
            torch.randn(*ROUNDED, device=self.device),
        )
        return self._once(("rounding",), lambda: rtn.quantize(w, None, runs, rtn.Config(scales="mse"))) / w.numel()

    def felt(self, cols: int) -> float:
        """The weight that the squared error of each column of a site has in the output's error."""
        h, config = self._moments(cols).h, self.job.steps.quant.config
        if not isinstance(config, gptq.Config):
            return 0.0
        return self._once(("felt", cols), lambda: gptq.residuals(h, [cols], config).float() @ h, 1)

    def solve(self) -> float:
        """A knapsack over the choices of all units, with plausible sizes and damage."""
        draw_one, groups = random.Random(0), []
        for unit in self.layout.units.values():
            rows = sum(self.layout.weights[name].rows for name in unit.weights)
            bits = [1 + 7 * item / ITEMS for item in range(ITEMS)]
            groups.append([(round(rows * own), draw_one.uniform(0.5, 2) * 4.0**-own) for own in bits])
        capacity = sum(group[len(group) // 2][0] for group in groups)
        return self._once(("solve",), lambda: knapsack(groups, capacity, Solver()), 1)

    def information(self) -> float:
        """One sample in the estimate of an increment's information about the prediction."""
        assert self.job.steps.importance is not None
        x = torch.randn(SAMPLES, self.layout.sizes["hidden"])
        y = torch.randint(self.layout.sizes["vocab"], (SAMPLES,))
        config = self.job.steps.importance.config
        return self._once(("information",), lambda: information(x, y, config), 1) / SAMPLES
