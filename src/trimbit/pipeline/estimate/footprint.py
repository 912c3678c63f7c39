"""Bytes that each stage of a job holds at once, on top of the process with the model opened.

Computed from sizes alone. The large parts are the model in bf16, hidden states, the original's probabilities, the
KV cache while text is sampled, the embedding while it is read or compressed, and activations kept for gradients.
"""

from trimbit.calibrate.sample import BATCH
from trimbit.calibrate.teacher import CARRIED
from trimbit.measure import variants
from trimbit.model.forward.compute import native
from trimbit.model.forward.logits import LOGIT_TOKENS
from trimbit.model.forward.stream import CHUNK_TOKENS
from trimbit.model.kv_nbytes import cache_nbytes
from trimbit.pipeline.job import Job
from trimbit.search.effort import Effort
from trimbit.search.two_formats.config import MaskedSearch
from trimbit.trial.masked.memory import masked_nbytes

FP32, FP64, BF16 = 4, 8, 2
QUANTISING = 150_000_000  # ours: held by a quantiser and its grid search besides the weights
HEAP = 100_000_000  # ours: code that is loaded later, and freed memory that the allocator keeps


class Footprint:
    """Bytes that the stages of one job hold."""

    def __init__(self, job: Job, effort: Effort, budget_nbytes: int) -> None:
        self.job, self.layout, self.effort, self.budget_nbytes = job, job.layout, effort, budget_nbytes
        sizes, want = job.layout.sizes, job.recipe.calibration
        self.hidden, self.mid, self.vocab = sizes["hidden"], sizes["mid"], sizes["vocab"]
        self.embedding = self.vocab * self.hidden
        self.block = sum(w.rows * w.cols for w in self.layout.weights.values() if w.unit.startswith("blocks.0."))
        self.cols = [w.cols for w in self.layout.weights.values() if w.unit.startswith("blocks.0.")]
        self.tokens = want.rows * want.length
        self.chunk = max(CHUNK_TOKENS, want.length)
        self.stream = BF16 * self.embedding * (1 if job.recipe.rotation is None else 2)  # kept by each stream
        self.logits = 4 * FP32 * LOGIT_TOKENS * self.vocab

    @property
    def _read(self) -> int:
        """Held while the embedding is read."""
        return FP32 * self.embedding

    @property
    def _head(self) -> int:
        """A head that logits are made by."""
        return native(self.job.compute, self.job.device.type).itemsize * self.embedding

    @property
    def _model(self) -> int:
        return BF16 * self.layout.parameters

    def _passing(self, tokens: int) -> int:
        """Held by a block while some tokens pass through it."""
        return tokens * (6 * self.hidden + 3 * self.mid) * FP32

    @property
    def _factor(self) -> int:
        """Held while the largest H is factored."""
        return 4 * FP64 * max(self.cols) ** 2

    def text(self) -> int:
        """The model, and the keys and values of all rows of a batch."""
        config, rows = self.layout.config, min(BATCH, self.job.rows)
        kept = rows * cache_nbytes(config, {}, None, self.job.recipe.calibration.length)
        drawn = 4 * FP32 * rows * self.vocab
        return self.stream + self._model + max(self._read, kept + kept // self.layout.blocks + drawn)

    def moments(self) -> int:
        """Hidden states (twice while they are saved), a block and its sums."""
        states = FP32 * self.tokens * self.hidden
        sums = 2 * FP32 * sum(n * n for n in set(self.cols))
        return self.stream + max(self._read, 2 * states + FP32 * self.block + sums + self._passing(self.chunk))

    def ranking(self) -> int:
        """Matrices of H; for gradients the inputs of all blocks, and one block's gradients."""
        assert self.job.steps.criterion is not None
        module, config = self.job.steps.criterion
        if module.READS == "moments":
            return self.stream + self._factor
        tokens: int = config.samples * config.length
        before = (self.layout.blocks + 2) * tokens * self.hidden * FP32
        return self.stream + self._read + before + 5 * FP32 * self.block + self.logits

    def importance(self) -> int:
        """Hidden states before and after a sub-block, and what the sub-block adds."""
        states = FP32 * self.tokens * self.hidden
        return self.stream + self._read + 5 * states + FP32 * self.block

    def predicted(self) -> int:
        """Inputs of all blocks, gradients of each draw, a block forward and back, moments of its weights' inputs."""
        measure = self.job.recipe.measure
        assert measure is not None
        tokens = measure.rows * measure.length
        states = (self.layout.blocks + 2 + measure.draws) * tokens * self.hidden * FP32
        sums = 2 * FP32 * sum(n * n for n in self.cols)
        back = 3 * self._passing(min(tokens, self.chunk)) + 2 * FP32 * self.block + sums
        return self.stream + max(self._read + QUANTISING, states + max(back, self._head + self.logits))

    def corrected(self, count: int) -> int:
        """Hidden states of every changed model, before and after a block, and the block."""
        measure = self.job.recipe.measure
        assert measure is not None
        tokens = min(measure.rows, variants.ROWS) * min(measure.length, variants.LENGTH)
        states = 2 * (count + 1) * tokens * self.hidden * FP32
        passing = max(self._passing(CHUNK_TOKENS) + FP32 * self.block, self._head + self.logits)
        return self.stream + states + passing

    def measuring(self, *, damage: bool) -> int:
        """The model in memory, its head, and the stored outputs of the original."""
        measure, want = self.job.recipe.measure, self.job.recipe.calibration
        assert measure is not None
        choose, rows = want.held_out * measure.length, measure.rows * measure.length
        held = self.stream + self._model + BF16 * self.embedding + self._head + choose * self.hidden * FP32
        passing = self._passing(max(choose, rows if damage else 0))
        if damage:
            held += rows * (BF16 * self.vocab + (self.layout.blocks + 1) * self.hidden * FP32)
        return held + max(passing + self.logits, self._quantising_embedding)

    @property
    def _quantising_embedding(self) -> int:
        """The embedding in fp32, its codes, and what a quantiser holds besides them."""
        return (FP32 + 3) * self.embedding + QUANTISING + self._factor

    def applied(self) -> int:
        """Hidden states, a block twice and its inputs for fitting; the embedding being compressed."""
        want = self.job.recipe.calibration
        held = (want.held_out + want.report) * want.length if self.job.needs_text else 0
        fits = self.tokens if self.job.needs_moments else 0
        states = FP32 * self.hidden * (fits + held)
        inside = BF16 * fits * self.mid + 2 * FP32 * self.block + self._passing(self.chunk) + QUANTISING + self._factor
        ends = BF16 * self.embedding + 2 * self._head + 2 * self.logits
        return self.stream + max(self._quantising_embedding, states + self.embedding + max(inside, ends))

    def teacher(self, tokens: int) -> int:
        """Hidden states of the rows that one sweep carries, and the head."""
        states = min(tokens * self.hidden * FP32, 2 * CARRIED)
        return self.stream + max(self._read, states + FP32 * self.block + self._passing(self.chunk))

    def pairs(self) -> int:
        """The packed model, the original's head, the trained pairs, and activations of a few rows."""
        tune = self.job.steps.tune
        assert tune is not None
        blocks = 1 if tune.checkpointing else self.layout.blocks
        width = 16 * self.hidden + 8 * self.mid
        left = tune.micro * tune.length * blocks * width * BF16
        trained = 4 * FP32 * self.job.rank * sum(w.rows + w.cols for w in self.layout.weights.values())
        return self.stream + self.budget_nbytes + BF16 * self.embedding + self._head + left + trained + self.logits

    def masked(self) -> int:
        """Both formats or the weights, the tables, activations of a row, the learnt parameters and AdamW's state."""
        config = self.job.steps.search
        if not isinstance(config, MaskedSearch):
            return 0
        itemsize = native(self.job.compute, self.job.device.type).itemsize
        return self.stream + masked_nbytes(self.layout, config, itemsize)
