"""Quantisers and the refit on a device that refuses tensors of others, against the CPU."""

import pytest
import torch

from pretend import DEVICE, OnDevice, Pretend
from trimbit.calibrate.moments import Moments
from trimbit.kernels.qtensor import QTensor
from trimbit.schema.precision import Run, parse_precision
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.repair import refit

FORMATS = ("int4g32", "uint3g64", "nf4g32", "ternaryrow", "binaryg32", "mbinaryg32", "bf16")


def generator():
    return torch.Generator().manual_seed(0)


def moments(cols, device="cpu"):
    x = torch.randn(4 * cols, cols, generator=generator()) @ torch.randn(cols, cols, generator=generator())
    h = x.T @ x / len(x)
    return Moments(
        count=len(x), h=h.to(device), mean=x.mean(0).to(device), cross=h.to(device), dense_mean=x.mean(0).to(device)
    )


def tensors(packed: QTensor):
    return {name: getattr(packed, name) for name in ("codes", "scales", "zeros")}


@pytest.mark.parametrize("module", [gptq, rtn])
@pytest.mark.parametrize("precision", FORMATS)
def test_quantisers(module, precision):
    w, runs = torch.randn(12, 96, generator=generator()), (Run(count=96, precision=parse_precision(precision)),)
    expected = tensors(module.quantize(w, moments(96), runs, module.Config(scales="mse")))
    with Pretend():
        found = tensors(module.quantize(w.to(DEVICE), moments(96, DEVICE), runs, module.Config(scales="mse")))
    assert found.keys() == expected.keys()
    for name, own in expected.items():
        if own is not None:
            assert isinstance(found[name], OnDevice)
            assert torch.equal(found[name].held, own)


def test_the_refit():
    w, index, bias = torch.randn(12, 64, generator=generator()), torch.arange(0, 64, 2), torch.ones(12)

    def run(device):
        full = moments(64, device)
        kept = Moments(
            count=full.count, h=full.h[index][:, index], mean=full.mean[index], cross=full.cross[:, index],
            dense_mean=full.dense_mean,
        )  # fmt: skip
        own = w.to(device)
        return refit.refit(own, own[:, index], bias.to(device), kept, kept, refit.Config())

    expected = run("cpu")
    with Pretend():
        found = run(DEVICE)
    assert torch.equal(found.weight.held, expected.weight)
    assert torch.equal(found.bias.held, expected.bias)
    assert found.ridge == expected.ridge
