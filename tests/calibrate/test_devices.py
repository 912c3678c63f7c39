"""Every sweep on a device that refuses tensors of others gives what it gives on the CPU."""

import pytest
import torch
from safetensors.torch import load_file

from pretend import DEVICE, MixedDevicesError, OnDevice, Pretend
from tiny import VOCAB, save_tiny, tiny_model
from trimbit.calibrate import gradients, sensitivity
from trimbit.calibrate.stats import collect
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import CPU, BlockStream

TOKENS = torch.randint(3, VOCAB, (6, 20), generator=torch.Generator().manual_seed(0))
NEAR = {"rtol": 1e-2, "atol": 1e-4}  # attention runs by other kernels, and inputs are rounded to bf16


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen2", "phi3"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    save_tiny(tiny_model(request.param).bfloat16(), path)
    return path


def stream_on(path, device):
    checkpoint = open_checkpoint(path)
    return BlockStream(checkpoint, build_layout(checkpoint.config), torch.float32, device)


def both(path, run):
    """What a sweep gives on the CPU and on the device."""
    on_cpu = run(stream_on(path, CPU))
    with Pretend():
        return on_cpu, run(stream_on(path, DEVICE))


def nothing(*_):
    return {}


def test_moments(path, tmp_path):
    def run(stream):
        folder = tmp_path / stream.device.type
        folder.mkdir()
        collect(stream, TOKENS, folder, nothing)
        return {name: own for file in sorted(folder.iterdir()) for name, own in load_file(file).items()}

    on_cpu, on_device = both(path, run)
    assert on_cpu.keys() == on_device.keys()
    for name, own in on_cpu.items():
        torch.testing.assert_close(on_device[name], own, rtol=1e-2, atol=1e-3)  # correlations are in fp16


def test_gradients(path):
    def run(stream):
        return {name: own for _, found in gradients.sweep(stream, TOKENS, nothing) for name, own in found.items()}

    on_cpu, on_device = both(path, run)
    for name, own in on_cpu.items():
        assert isinstance(on_device[name].g, OnDevice)
        torch.testing.assert_close(on_device[name].g.held, own.g, **NEAR)
        torch.testing.assert_close(on_device[name].fisher.held, own.fisher, **NEAR)


def test_sensitivities(path):
    def run(stream):
        layout, found = stream.layout, {}
        outs = {unit.block: layout.weights[unit.out_weight] for unit in layout.units.values() if unit.dim}

        def changes(index):
            weight = outs[index]
            return {
                "cut": sensitivity.Change(
                    weight=weight.name, delta=torch.ones(weight.rows, weight.cols), bias=torch.ones(weight.rows)
                )
            }

        for own in sensitivity.sweep(stream, TOKENS, 2, 0, changes, nothing):
            found |= own.weights | {(name, len(found)): damage for name, damage in own.changes.items()}
        return found

    on_cpu, on_device = both(path, run)
    assert on_cpu.keys() == on_device.keys()
    for name, own in on_cpu.items():
        if isinstance(own, float):
            assert on_device[name] == pytest.approx(own, rel=1e-3)
        else:
            torch.testing.assert_close(on_device[name].h.held, own.h, **NEAR)
            torch.testing.assert_close(on_device[name].rows.held, own.rows, **NEAR)


def test_the_device_refuses_tensors_of_the_cpu():
    with Pretend():
        there = torch.ones(3, device=DEVICE)
        with pytest.raises(MixedDevicesError, match="is on the CPU"):
            there + torch.ones(3)
        assert float((there + 1.0).sum()) == 6
        assert there.cpu().tolist() == [1, 1, 1]
        with pytest.raises(TypeError, match="no numpy"):
            there.numpy()
