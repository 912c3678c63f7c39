"""The comparison of two devices, on one that is not there."""

import pytest
import yaml

import device_check
from jobs import BUDGET
from pretend import DEVICE, Pretend


@pytest.fixture
def arguments(job, tmp_path):
    recipe = tmp_path / "fp32.yaml"  # the device that is not there knows no autocast
    fields = yaml.safe_load(job.recipe.read_text()) | {"compute": "float32", "criterion": {"name": "activation"}}
    recipe.write_text(yaml.safe_dump(fields | {"quant": {"name": "rtn", "params": {"scales": "absmax"}}}))
    return [str(job.model), "--recipe", str(recipe), "--budget", BUDGET, "--calibration", str(job.text), "--device"]


@pytest.mark.slow
def test_both_are_compared(arguments, capsys):
    with Pretend():
        assert device_check.main([*arguments, str(DEVICE)]) == 0
    out = capsys.readouterr().out
    assert "applied" in out
    assert "the plans are the same" in out


def test_a_kl_that_is_far_off_is_a_failure(arguments, monkeypatch):
    monkeypatch.setattr(device_check, "KL_APART", -1.0)
    assert device_check.main([*arguments, "cpu"]) == 1
