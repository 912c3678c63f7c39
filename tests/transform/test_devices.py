"""Quantisers and the refit on a device that refuses tensors of others, against the CPU."""

import pytest
import torch
from safetensors.torch import load_file

from plans import make_plan, runs
from pretend import DEVICE, OnDevice, Pretend
from tiny import VOCAB, save_tiny, tiny_model
from trimbit.calibrate.moments import Moments
from trimbit.kernels.qtensor import QTensor
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import CPU, BlockStream
from trimbit.schema.precision import Run, parse_precision
from trimbit.transform.apply import apply_plan
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.repair import refit
from trimbit.transform.weight import WeightCompressor
from written import collected, taught, writing

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
    w, own = torch.randn(12, 96, generator=generator()), (Run(count=96, precision=parse_precision(precision)),)
    expected = tensors(module.quantize(w, moments(96), own, module.Config(scales="mse")))
    with Pretend():
        found = tensors(module.quantize(w.to(DEVICE), moments(96, DEVICE), own, module.Config(scales="mse")))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor is not None:
            assert isinstance(found[name], OnDevice)
            assert torch.equal(found[name].held, tensor)


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


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("phi3", False)])
def test_an_application(model_type, tied, tmp_path):
    save_tiny(tiny_model(model_type, tied=tied).bfloat16(), tmp_path / "original")
    checkpoint = open_checkpoint(tmp_path / "original")
    layout = build_layout(checkpoint.config)
    cuts = {f"blocks.{i}.mlp.mid": tuple(range(0, 80, 2)) for i in range(2)} | {"blocks.1.attn.kv": (0, 2)}
    biases = tuple(unit.out_weight for unit in layout.units.values() if cuts.get(unit.dim))
    plan = make_plan(layout, lambda _, n: runs((n, "int4g32")), cuts, biases)
    tokens = torch.randint(3, VOCAB, (10, 64), generator=generator())
    stats = collected(BlockStream(checkpoint, layout, torch.float32), tokens, tmp_path / "stats")
    method = WeightCompressor(module=gptq, config=gptq.Config(scales="absmax"))  # the search for scales is tested above

    def run(device):
        stream, out = BlockStream(checkpoint, layout, torch.float32, device), tmp_path / device.type
        rows = taught(stream, tokens[:2], out.parent / f"taught-{device.type}")
        with writing(out, layout, plan) as writer:
            kl = apply_plan(stream, plan, tokens, method, refit.Config(), stats, writer, lambda *_: None, *rows)
        return kl, load_file(out / "model.safetensors")

    kl, written = run(CPU)
    with Pretend():
        kl_there, written_there = run(DEVICE)
    assert kl_there == pytest.approx(kl, rel=0.05)  # codes may round the other way
    assert written.keys() == written_there.keys()
    assert all(own.shape == written_there[name].shape for name, own in written.items())
