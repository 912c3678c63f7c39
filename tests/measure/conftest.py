"""A tiny llama, tied or not, and its quantised weights."""

import pytest
import torch

from measured import SPACE, TOKENS
from tiny import save_tiny, tiny_model
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream
from trimbit.transform.quant import rtn
from trimbit.transform.weight import WeightCompressor
from trimbit.trial.candidates import CandidateWeights
from written import collected


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def stream(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    save_tiny(tiny_model("llama", tied=request.param).bfloat16(), path)
    checkpoint = open_checkpoint(path)
    return BlockStream(checkpoint, build_layout(checkpoint.config), torch.float32)


@pytest.fixture(scope="module")
def candidates(stream, tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidates")
    stats = collected(stream, TOKENS, folder / "stats")
    rankings = {unit.dim: tuple(reversed(range(unit.size))) for unit in stream.layout.units.values() if unit.dim}
    method = WeightCompressor(module=rtn, config=rtn.Config())
    return CandidateWeights(stream.checkpoint, stream.layout, stats, method, folder, rankings, SPACE)
