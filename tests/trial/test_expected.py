"""Expected errors against those that the quantisers make."""

import pytest
import torch

from tiny import VOCAB, save_tiny, tiny_model
from trimbit.calibrate.stats import Stats
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream
from trimbit.schema.precision import BF16, Run, parse_precision
from trimbit.transform.quant import gptq, rtn
from trimbit.trial.expected import ExpectedErrors
from trimbit.trial.moments import moments_of
from written import collected

TOKENS = torch.randint(3, VOCAB, (16, 48), generator=torch.Generator().manual_seed(0))
NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def opened(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    save_tiny(tiny_model("llama", tied=request.param).bfloat16(), path)
    checkpoint = open_checkpoint(path)
    layout = build_layout(checkpoint.config)
    stats = collected(BlockStream(checkpoint, layout, torch.float32), TOKENS, path / "stats")
    assert isinstance(stats, Stats)
    return checkpoint, layout, stats


@pytest.mark.parametrize("name", [NAME, "model.layers.0.self_attn.q_proj", "model.embed_tokens"])
@pytest.mark.parametrize("precision", ["int4g32", "uint3g64", "nf4g64", "int2row", "ternaryrow", "mbinaryg32"])
@pytest.mark.parametrize("module", [gptq, rtn])
def test_are_about_those_that_are_made(opened, name, precision, module):
    checkpoint, layout, stats = opened
    moments, fmt = moments_of(layout, stats, layout.weights[name]), parse_precision(precision)
    config = module.Config(scales="mse")
    errors = ExpectedErrors(checkpoint, layout, stats, config)
    w = checkpoint.tensor(f"{name}.weight").float()
    made = module.quantize(w, moments, (Run(count=w.shape[1], precision=fmt),), config).dequantize() - w
    real = torch.linalg.vecdot(made @ moments.h, made)
    found = errors.of_rows(name, torch.arange(len(w)), fmt, errors.felt(name, moments.h)[:, None])[:, 0]
    assert found.shape == real.shape
    assert float(found.sum()) == pytest.approx(float(real.sum()), rel=0.35)


def test_some_rows_and_bf16(opened):
    checkpoint, layout, stats = opened
    errors, fmt = ExpectedErrors(checkpoint, layout, stats, gptq.Config()), parse_precision("int3g32")
    rows, felt = torch.arange(layout.weights[NAME].rows), torch.rand(layout.weights[NAME].cols, 2)
    whole = errors.of_rows(NAME, rows, fmt, felt)
    torch.testing.assert_close(errors.of_rows(NAME, rows[5:9], fmt, felt), whole[5:9])
    assert whole.shape == (layout.weights[NAME].rows, 2)
    assert not errors.of_rows(NAME, rows, BF16, felt).any()  # the weights are of bf16


@pytest.mark.parametrize("site", ["blocks.1.mlp.mid", "blocks.0.attn.a_in"])
@pytest.mark.parametrize("precision", ["uint2g64", "int4g32"])
@pytest.mark.parametrize("module", [gptq, rtn])
def test_weights_with_such_errors(opened, site, precision, module):
    """They are as wrong as expected, and nearly as wrong as those that are made."""
    checkpoint, layout, stats = opened
    fmt, config = parse_precision(precision), module.Config(scales="mse")
    errors = ExpectedErrors(checkpoint, layout, stats, config)
    state = errors.site_state(site, fmt)
    assert state.keys() == {f"{one.name}.weight" for one in layout.readers(site)}
    for weight in layout.readers(site):
        w, moments = checkpoint.tensor(f"{weight.name}.weight").float(), moments_of(layout, stats, weight)
        own = state[f"{weight.name}.weight"] - w
        felt = errors.felt(weight.name, moments.h)[:, None]
        expected = errors.of_rows(weight.name, torch.arange(len(w)), fmt, felt).sum()
        made = module.quantize(w, moments, (Run(count=w.shape[1], precision=fmt),), config).dequantize() - w
        assert float(torch.linalg.vecdot(own @ moments.h, own).sum()) == pytest.approx(float(expected), rel=0.3)
        assert float(torch.linalg.vecdot(made @ moments.h, made).sum()) == pytest.approx(float(expected), rel=0.35)
