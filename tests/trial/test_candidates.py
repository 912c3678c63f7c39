"""Candidates on disk: made once, and again where the disk has lost them."""

import logging

import pytest
import torch

from measured import SPACE, TOKENS
from tiny import save_tiny, tiny_model
from trimbit.measure.choices import sites_of
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream
from trimbit.schema.precision import parse_precision
from trimbit.transform.quant import rtn
from trimbit.transform.repair.lowrank import Config as Pairs
from trimbit.transform.weight import WeightCompressor
from trimbit.trial import candidates as module
from trimbit.trial.candidates import CandidateWeights
from written import collected

INT4 = parse_precision("int4g32")


@pytest.fixture(params=[0, 2], ids=["packed", "with pairs"])
def candidates(request, tmp_path):
    save_tiny(tiny_model("llama").bfloat16(), tmp_path / "original")
    checkpoint = open_checkpoint(tmp_path / "original")
    stream = BlockStream(checkpoint, build_layout(checkpoint.config), torch.float32)
    rankings = {unit.dim: tuple(range(unit.size)) for unit in stream.layout.units.values() if unit.dim}
    return CandidateWeights(
        checkpoint, stream.layout, collected(stream, TOKENS, tmp_path / "stats"),
        WeightCompressor(module=rtn, config=rtn.Config(), pairs=Pairs() if request.param else None),
        tmp_path / "kept", rankings, SPACE, rank=request.param, ahead=True,
    )  # fmt: skip


def test_other_formats_of_a_site_are_made_only_ahead(candidates):
    weight = candidates.layout.weights["model.layers.1.mlp.up_proj"]
    made = {}
    for ahead in (False, True):
        candidates.ahead = ahead
        candidates.compressed(weight, INT4 if not ahead else parse_precision("int3g32"))
        made[ahead] = {path.name for path in candidates.folder.glob("*.safetensors")}
    site = {f"model.layers.1.mlp.{name}.int4g32.safetensors" for name in ("up_proj", "gate_proj")}
    assert made[False] == site
    assert made[True] > site


def test_a_damaged_candidate_is_named_and_made_again(candidates, caplog):
    layout = candidates.layout
    unit = layout.units["blocks.1.mlp"]
    formats = dict.fromkeys(sites_of(layout, unit), INT4)
    made = {width: candidates.unit_state(unit, width, formats) for width in (unit.size, 32)}
    files = sorted(candidates.folder.glob("*.int4g32.*"))
    assert files
    assert not caplog.records
    for at, file in enumerate(files):
        whole = file.read_bytes()
        file.write_bytes(whole[:50] if at % 2 else whole[:-1] + bytes([whole[-1] ^ 1]))  # cut off, or one bit flipped
    with caplog.at_level(logging.WARNING):
        again = {width: candidates.unit_state(unit, width, formats) for width in (unit.size, 32)}
    assert {str(file) for file in files} == {str(record.args[0]) for record in caplog.records}
    for width, state in made.items():
        assert state.keys() == again[width].keys()
        assert all(torch.equal(again[width][name], tensor) for name, tensor in state.items())


def test_what_another_process_has_made_meanwhile_is_taken(candidates, monkeypatch):
    """Between the look that finds no file, and the making."""
    weight = candidates.layout.weights["model.layers.1.mlp.up_proj"]
    path = candidates._path(weight, INT4)
    real, looks = module.load_tensors, []

    def late(asked):
        looks.append(asked)
        if len(looks) == 1:
            candidates._make(weight, INT4)
            return None
        return real(asked)

    monkeypatch.setattr(module, "load_tensors", late)
    made = candidates.compressed(weight, INT4)
    assert looks == [path, path]
    assert torch.equal(made.dense(), candidates.compressed(weight, INT4).dense())
