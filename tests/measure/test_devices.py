"""Predicted damage and removals on a device that refuses tensors of others, against the CPU."""

import pytest
import torch

from measured import REF, SPACE, TOKENS
from pretend import DEVICE, Pretend
from trimbit.measure.predict import predict
from trimbit.measure.removals import measure_removals
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


def test_removals(stream, on_device, tmp_path):
    expected = measure_removals(stream, TOKENS, SPACE, tmp_path / "cpu", nothing)
    found = measure_removals(on_device, TOKENS, SPACE, tmp_path / "device", nothing)
    assert found == pytest.approx(expected, rel=1e-3)
