"""Seconds of each stage of a job: how often its pieces run, times their seconds."""

from collections.abc import Iterable, Sequence

from trimbit.calibrate.sample import BATCH, segment_tokens
from trimbit.measure import variants
from trimbit.measure.choices import allowed_widths
from trimbit.measure.corrected import FEW_BITS
from trimbit.measure.damage import Change
from trimbit.measure.predict import ROWS
from trimbit.model.layout import Unit, Weight
from trimbit.pipeline.estimate.timing import Pieces
from trimbit.pipeline.job import Job
from trimbit.recover.tune import Config as Tuning
from trimbit.schema.precision import BF16, Int, Precision
from trimbit.search.effort import Effort
from trimbit.search.two_formats.config import MaskedSearch, MaskTraining

CUT = 0.1  # ours: share of the sub-blocks that a plan is expected to cut if it may
PLANNED = 2  # ours: formats of a weight in the plans that are assembled
NORMS = 0.1  # ours: share of a pass that running the norms again for every site of a half adds
PROPOSAL = 0.5  # ours: seconds to fit the Gaussian process and propose a plan
PLAIN = Int(bits=4, group=64, symmetric=False)  # where the recipe names no formats
DOCUMENTS, DOCUMENT_TOKENS = 2000, 200  # ours: documents of an unlimited task; tokens of a document with its choices


class Costs:
    """Seconds of the stages of one job."""

    def __init__(self, job: Job, pieces: Pieces, effort: Effort) -> None:
        self.job, self.pieces, self.effort, self.layout = job, pieces, effort, job.layout
        self.want, self.measure = job.recipe.calibration, job.recipe.measure
        self.block = [w for w in self.layout.weights.values() if self.layout.units[w.unit].block == 0]
        self.ends = [w for w in self.layout.weights.values() if self.layout.units[w.unit].block is None]
        self.cuttable = [unit for unit in self.layout.units.values() if unit.block == 0 and unit.dim is not None]

    # --- combined pieces ---

    @property
    def fit_tokens(self) -> int:
        """The number of tokens that are fitted to."""
        return self.want.rows * self.want.length if self.job.needs_moments else 0

    def _sites(self, weights: Iterable[Weight]) -> list[list[Weight]]:
        sites: dict[str, list[Weight]] = {}
        for weight in weights:
            sites.setdefault(weight.site, []).append(weight)
        return list(sites.values())

    def _elements(self, weights: Iterable[Weight]) -> int:
        return sum(weight.rows * weight.cols for weight in weights)

    def _sweep(self, tokens: int) -> float:
        """Streaming some tokens through all blocks."""
        return self.layout.blocks * (self.pieces.load() + tokens * self.pieces.streamed(self.want.length))

    def _model(self) -> float:
        """Loading the whole model into memory."""
        return self.layout.blocks * self.pieces.load()

    def _grams(self, tokens: int) -> float:
        return sum((tokens * self.pieces.gram(site[0].cols) for site in self._sites(self.block)), 0.0)

    def _compressed(self, weights: Sequence[Weight], formats: Sequence[Precision]) -> float:
        """Compressing the weights of one site in all formats: in one call, unless they have low-rank pairs."""
        if not formats:
            return 0.0
        if self.job.rank and weights[0] not in self.ends:
            return sum(self.pieces.compress(w.cols, w.rows * w.cols, (p,)) for w in weights for p in formats)
        return self.pieces.compress(weights[0].cols, self._elements(weights) * len(formats), tuple(formats))

    def _candidates(self, formats: Sequence[Precision], embedding_formats: Sequence[Precision]) -> float:
        """Candidates of all weights; `embedding_formats` are for the embedding and the head."""
        own = sum(self._compressed(site, formats) for site in self._sites(self.block))
        return self.layout.blocks * own + sum(self._compressed([w], [p]) for w in self.ends for p in embedding_formats)

    def _cut(self, unit: Unit, width: int, precision: Precision, ridges: int = 1) -> float:
        """Refitting and compressing the output weight of a cut sub-block."""
        assert unit.out_weight is not None
        weight = self.layout.weights[unit.out_weight]
        fitted = self.pieces.refit(unit, width, ridges) if self.job.steps.repair is not None else 0.0
        cols = self.layout.weight_shape(weight, width)[1]
        return fitted + self.pieces.compress(weight.cols, weight.rows * cols, (precision,))

    def _forward(self, rows: int, length: int) -> float:
        return self.layout.blocks * rows * length * self.pieces.in_memory(rows, length)

    @property
    def _format(self) -> Precision:
        """An example of the job's formats: all take about as long."""
        formats = self.job.space.formats or self.effort.formats
        return formats[len(formats) // 2] if formats else getattr(self.job.steps.search, "blocks", PLAIN)

    @property
    def _table_format(self) -> Precision:
        """Likewise for the embedding and the head."""
        formats = self.job.space.embedding_formats or self.effort.embedding_formats
        return formats[len(formats) // 2] if formats else getattr(self.job.steps.search, "embedding", PLAIN)

    def _installed(self) -> float:
        """Putting all candidates of a plan into the model."""
        elements = self.layout.blocks * self._elements(self.block) + self._elements(self.ends)
        return elements * self.pieces.dequantize(self._format)

    def _assembled(self) -> float:
        """Assembling a plan from candidates and measuring it."""
        assert self.measure is not None
        rows, length = self.want.held_out, self.measure.length
        ends = rows * length * (2 * self.pieces.logits() + self.pieces.divergence())
        return self._installed() + self._forward(rows, length) + ends

    # --- stages ---

    def text(self) -> float:
        """Sampling token by token; before each segment of a row, the tokens so far are read again."""
        rows, length = self.job.rows, self.want.length
        total, step = self._model(), segment_tokens(length)
        for first in range(0, rows, BATCH):
            own = min(BATCH, rows - first)
            drawn, reading = self.pieces.sampling(own, length)
            again = sum(max(start - 1, 0) for start in range(0, length, step))
            total += length * drawn + own * again * reading
        return total

    def moments(self) -> float:
        """A sweep that sums up the moments of each site."""
        tokens = self.fit_tokens
        return self._sweep(tokens) + self.layout.blocks * self._grams(tokens) + tokens * self.pieces.gram(
            self.layout.sizes["hidden"]
        )  # fmt: skip

    def ranking(self) -> float:
        """Scores of every dim; for gradients a sweep forward and back."""
        assert self.job.steps.criterion is not None
        module, config = self.job.steps.criterion
        total = self.layout.blocks * self.pieces.score()
        if module.READS == "gradients":
            tokens = config.samples * config.length
            each = self.pieces.streamed(config.length) + self.pieces.gradient(1, config.length, weights=True)
            total += self.layout.blocks * (2 * self.pieces.load() + tokens * each)
            total += tokens * self.pieces.head_gradient()
        return total

    def importance(self) -> float:
        """Two sweeps, the predictions, and the information of three increments per block."""
        tokens = self.want.rows * self.want.length
        told = 3 * self.layout.blocks * tokens * self.pieces.information()
        return 2 * self._sweep(tokens) + tokens * self.pieces.logits() + told

    def damage(self, changes: Sequence[Change], share: float) -> float:
        """Measuring each change not known yet, from its block on, and making the missing `share` of the candidates."""
        assert self.measure is not None
        rows, length = self.measure.rows, self.measure.length
        ends = rows * length * (self.pieces.logits() + self.pieces.divergence())
        forward, element = self._forward(rows, length), self.pieces.dequantize(self._format)
        background = self._installed() + 2 * forward + ends
        total = sum(
            self._elements(self.layout.weights[name] for name in change.unit.weights) * element
            + forward * (1 - (change.unit.block or 0) / self.layout.blocks)
            + ends
            for change in changes
        )
        space, around = self.job.space, self.effort.background
        embedding_formats = space.embedding_formats
        others = () if around is None else (p for p in around.formats.values() if p not in embedding_formats)
        made = self._candidates(list(dict.fromkeys((*space.formats, *others))), embedding_formats)
        for unit in self.cuttable:
            widths = (w for w in allowed_widths(self.layout, unit, space) if 0 < w < unit.size)
            made += self.layout.blocks * sum(self._cut(unit, width, self._format) for width in widths)
        return background + total + share * made

    def predicted(self) -> float:
        """A sweep forward and back, moments of every weight's inputs, and the errors of every format."""
        assert self.measure is not None
        tokens, draws, blocks = self.measure.rows * self.measure.length, self.measure.draws, self.layout.blocks
        each = draws * self.pieces.gradient(1, self.measure.length, weights=False)
        each += sum(self.pieces.gram(weight.cols) for weight in self.block)
        passes = self._sweep(tokens) + self._model() + tokens * blocks * each
        ends = tokens * (draws * self.pieces.head_gradient() + self.pieces.gram(self.layout.sizes["hidden"]))
        space, layout = self.job.space, self.layout
        elements = len(space.formats) * blocks * sum(min(w.rows, ROWS) * w.cols for w in self.block)
        elements += len(space.embedding_formats) * sum(min(w.rows, ROWS) * w.cols for w in self.ends)
        factors = sum(blocks * self.pieces.felt(site[0].cols) for site in self._sites(self.block))
        cuts = 0.0
        for unit in self.cuttable:
            widths = (w for w in allowed_widths(layout, unit, space) if 0 < w < unit.size)
            cuts += blocks * sum(self._cut(unit, width, BF16) for width in widths)
        return passes + ends + elements * self.pieces.rounding() + factors + cuts

    def corrected(self, count: int) -> float:
        """Running the model with each of `count` changes, from the changed block on, and errors of few bits."""
        assert self.measure is not None
        rows, length = min(self.measure.rows, variants.ROWS), min(self.measure.length, variants.LENGTH)
        tokens = rows * length
        passes = self.layout.blocks * tokens * (1 + count / 2) * self.pieces.streamed(length)
        ends = tokens * (self.pieces.logits() + count * (self.pieces.logits() + self.pieces.divergence()))
        errors = 0.0
        if any(one.bits < FEW_BITS for one in self.job.space.formats):
            errors = sum(self.pieces.felt(site[0].cols) for site in self._sites(self.block))
            errors += sum(weight.rows * weight.cols for weight in self.block) * self.pieces.rounding()
        return self._model() + passes + ends + self.layout.blocks * errors

    def plan(self) -> float:
        """The search itself, without the stages that it asks for."""
        effort, total = self.effort, 0.0
        judged = effort.assembled + (effort.trials if self.job.objective and not self.job.objective.steps else 0)
        if judged or effort.damage_rounds:
            assert self.measure is not None
            total += self._model() + self._forward(self.want.held_out, self.measure.length)
        if effort.damage_rounds and self.measure is not None:
            rows, length = self.measure.rows, self.measure.length
            total += self._forward(rows, length) + rows * length * self.pieces.logits()
        formats = effort.formats if effort.trials == 0 else (*effort.formats, *self.job.space.formats)
        embedding_formats = effort.embedding_formats if effort.trials == 0 else self.job.space.embedding_formats[:1]
        if self.job.predicts and effort.assembled:
            formats = (*formats, *[self._format] * PLANNED)
            embedding_formats = (*embedding_formats, *[self._table_format] * PLANNED)
        if judged:
            total += judged * self._assembled()
        total += self._candidates(formats, embedding_formats)
        if effort.cut:
            total += effort.cut * self.layout.blocks * sum(
                self._cut(unit, unit.size // 2 or 1, self._format) for unit in self.cuttable
            )  # fmt: skip
        if effort.trials:
            total += effort.trials * (PROPOSAL + self._tasks())
        return total + effort.solved * self.pieces.solve() + self._masked() + self._rounded()

    def _tasks(self) -> float:
        goal = self.job.objective
        if goal is None or not goal.tasks:
            return 0.0
        documents = len(goal.tasks) * (goal.documents or DOCUMENTS)
        each = self.layout.blocks * self.pieces.in_memory(1, DOCUMENT_TOKENS) + self.pieces.logits()
        return documents * DOCUMENT_TOKENS * each

    def _masked(self) -> float:
        """Rows run under masks; to round or to draw errors, a layer computes a second product of the same size."""
        config = self.job.steps.search
        if not isinstance(config, MaskedSearch) or not (self.effort.mask_steps or self.effort.masked_rows):
            return 0.0
        length, blocks = config.length, self.layout.blocks
        there = 2 * blocks * self.pieces.in_memory(1, length)
        total = self.effort.masked_rows * length * (there + 2 * self.pieces.logits() + self.pieces.divergence())
        if isinstance(config, MaskTraining):
            back = 2 * blocks * self.pieces.gradient(1, length, weights=False) + (there if config.checkpointing else 0)
            ends = self.pieces.head_gradient() + (self.pieces.logits() if config.loss == "kl" else 0)
            total += self.effort.mask_steps * config.batch * length * (back + ends)
        return total

    def _rounded(self) -> float:
        return self.effort.rounded * self.pieces.rounding() if self.effort.rounded else 0.0

    def applied(self) -> float:
        """Applying a plan block by block: running each half, summing moments, compressing weights."""
        tokens, held = self.fit_tokens, (self.want.held_out + self.want.report) * self.want.length
        if not self.job.needs_text:
            held = 0
        cut = self._cut_share
        passes = (1 + NORMS + cut) * tokens + held
        own = sum(self._compressed(site, [self._format]) for site in self._sites(self.block))
        ridges = len(self.job.steps.repair.ridges) if self.job.steps.repair is not None else 0
        refits = sum(self.pieces.refit(u, u.size // 2 or 1, ridges) for u in self.cuttable) if cut and ridges else 0.0
        blocks = self._sweep(round(passes)) + self.layout.blocks * (self._grams(tokens) + own + cut * refits)
        ends = held * (2 * self.pieces.logits() + self.pieces.divergence()) if held else 0.0
        return blocks + self._candidates((), [self._table_format]) + ends

    @property
    def _cut_share(self) -> float:
        """The share of the sub-blocks that a plan cuts and refits."""
        space = self.job.space
        if self.job.steps.repair is None or not self.cuttable:
            return 0.0
        if space.kept:
            return len(space.kept) / (len(self.cuttable) * self.layout.blocks)
        return CUT if any(len(allowed_widths(self.layout, unit, space)) > 1 for unit in self.cuttable) else 0.0

    def teacher(self, tokens: int) -> float:
        """The original's outputs for some tokens."""
        return self._sweep(tokens)

    def pairs(self, config: Tuning) -> float:
        """Steps of recovery through packed weights, which are unpacked both going forward and going back."""
        length, blocks = config.length, self.layout.blocks
        each = blocks * self.pieces.gradient(config.micro, length, weights=False) + self.pieces.head_gradient()
        each += blocks * self.pieces.in_memory(config.micro, length) if config.checkpointing else 0.0
        each += self.pieces.logits() if config.loss == "distill" else 0.0
        unpacked = (2 + config.checkpointing) * blocks * self._elements(self.block)
        parts = -(-config.batch // config.micro)
        again = parts * unpacked * self.pieces.dequantize(self._format)
        return config.steps * (config.batch * length * each + again)
