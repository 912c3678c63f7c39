"""A job's model under masks."""

import torch

from trimbit.pipeline.candidates import candidates_key
from trimbit.pipeline.job import Job, plain
from trimbit.pipeline.prepare import Prepared
from trimbit.pipeline.teacher import teacher
from trimbit.search.two_formats.config import MaskedSearch
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.weight import WeightCompressor
from trimbit.trial.candidates import CandidateWeights
from trimbit.trial.masked.layers import Layers
from trimbit.trial.masked.model import MaskedModel


def masked_model(job: Job, prepared: Prepared, config: MaskedSearch) -> MaskedModel:
    """The frozen model with a search's two formats in every weight of its blocks."""
    text, stats = prepared.text, prepared.stats
    assert text is not None
    assert stats is not None
    by_quantizer = config.error_model == "quantizer"
    compressor = job.compressor if by_quantizer else WeightCompressor(module=rtn, config=rtn.Config(scales="mse"))
    sites = dict.fromkeys(w.site for w in job.layout.weights.values() if job.layout.readers(w.site))
    orders = {}
    for site in sites:
        h = stats.moments(site).h.diagonal()
        orders[site] = h.argsort(stable=True) if config.sort else torch.arange(len(h))
    key = candidates_key(
        job, prepared, quant=plain(job.recipe.quant) if by_quantizer else {"name": "rtn", "scales": "mse"},
        repair=None, lowrank=plain(job.recipe.lowrank) if by_quantizer else None,
        order="second_moment" if config.sort else "original",
    )  # fmt: skip
    candidates = CandidateWeights(
        job.stream.checkpoint, job.layout, stats, compressor, job.runner.cache.store(key.stage, key.digest), {}, None,
        orders=orders,
    )  # fmt: skip
    rows, held_out = text.train.pieces(config.length).tokens, text.choose.tokens
    taught = teacher(job, [*held_out, *rows[: config.compared(len(rows))]])
    with job.reporter.stage("both formats of the weights") as progress:
        layers = Layers(candidates, config, orders, expected_gptq(job))
        return MaskedModel(job.stream, layers, rows, held_out, taught, config, progress, job.device)


def expected_gptq(job: Job) -> gptq.Config:
    """The configuration of GPTQ by which a search expects errors: the recipe's, or the default."""
    quant = job.steps.quant
    config: gptq.Config = quant.config if quant.module is gptq else gptq.Config()
    return config
