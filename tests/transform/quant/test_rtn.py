"""Round to nearest against a search over every point of the grid."""

import pytest
import torch

from plans import FORMATS, runs
from points import points
from trimbit.transform.quant import rtn
from trimbit.transform.quant.grid import fit_grid


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_every_element_goes_to_the_nearest_point(name, search, generator):
    w = torch.randn(5, 77, generator=generator)
    q = rtn.quantize(w, None, runs((77, name)), rtn.Config(scales=search)).dequantize()
    if name == "bf16":
        assert torch.equal(q, w.to(torch.bfloat16).float())
        return
    (run,) = runs((77, name))
    grid = fit_grid(w, (run,), search)
    near = (w - points(run, grid.scales[0], grid.zeros[0])).abs().amin(0)
    torch.testing.assert_close((w - q).abs(), near, rtol=1e-5, atol=1e-6)


def test_each_run_is_quantised_alone(generator):
    w = torch.randn(5, 100, generator=generator)
    parts = [(40, "int3g32"), (9, "bf16"), (13, "ternaryrow"), (11, "uint4row"), (27, "mbinaryg32")]
    whole = rtn.quantize(w, None, runs(*parts), rtn.Config(scales="mse")).dequantize()
    alone = [
        rtn.quantize(part, None, runs(pair), rtn.Config(scales="mse")).dequantize()
        for part, pair in zip(w.split([count for count, _ in parts], 1), parts, strict=True)
    ]
    assert torch.equal(whole, torch.cat(alone, 1))


@pytest.mark.parametrize("chunk", ["trimbit.transform.quant.grid.CHUNK", "trimbit.transform.quant.rtn.CHUNK"])
@pytest.mark.parametrize("formats", [runs((64, "int3g32")), runs((30, "mbinaryrow"), (34, "ternaryg32"))])
def test_a_large_weight_is_rounded_in_chunks(chunk, formats, monkeypatch, generator):
    w = torch.randn(50, 64, generator=generator)
    whole = rtn.quantize(w, None, formats, rtn.Config(scales="mse")).tensors()
    monkeypatch.setattr(chunk, 7 * 64)
    chunks = rtn.quantize(w, None, formats, rtn.Config(scales="mse")).tensors()
    assert whole.keys() == chunks.keys()
    assert all(torch.equal(tensor, chunks[name]) for name, tensor in whole.items())
