"""Predicted damage and measured changes on a device that refuses tensors of others, against the CPU."""

from functools import partial

import pytest
import torch

from measured import REF, SPACE, TOKENS
from pretend import DEVICE, Pretend
from trimbit.measure.predict import predict
from trimbit.measure.variants import measure_variants
from trimbit.model.forward.halves import only_half
from trimbit.model.forward.stream import BlockStream
from trimbit.transform.quant import gptq, rtn
from trimbit.trial.expected import ExpectedErrors


def nothing(*_):
    return None


@pytest.fixture
def on_device(stream):
    with Pretend():
        yield BlockStream(stream.checkpoint, stream.layout, torch.float32, DEVICE)


@pytest.mark.parametrize("module", [gptq, rtn])
def test_predicted_damage(stream, on_device, candidates, module):
    def run(own):
        errors = ExpectedErrors(stream.checkpoint, stream.layout, candidates.stats, module.Config(scales="absmax"))
        args = (candidates.change, candidates.rankings, REF, "digest", nothing)
        return predict(own, TOKENS, 2, 0, SPACE, errors, *args)

    expected, found = run(stream), run(on_device)
    for name in ("formats", "widths"):
        for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert one.damage == pytest.approx(other.damage, rel=1e-2)


def test_variants(stream, on_device, tmp_path):
    halves = [unit for unit in stream.layout.units.values() if unit.name.endswith(".mlp")]
    changes = {unit.block: {unit.name: partial(only_half, layout=stream.layout, unit=unit)} for unit in halves}
    expected = measure_variants(stream, TOKENS, changes, tmp_path / "cpu", nothing)
    found = measure_variants(on_device, TOKENS, changes, tmp_path / "device", nothing)
    assert found == pytest.approx(expected, rel=1e-3)
