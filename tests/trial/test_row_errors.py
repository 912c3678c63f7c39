"""Errors in some rows against those in the whole weights that the quantisers make."""

import pytest
import torch

from tiny import VOCAB, save_tiny, tiny_model
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream
from trimbit.schema.precision import BF16, Run, parse_precision
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.weight import WeightCompressor
from trimbit.trial.moments import moments_of
from trimbit.trial.row_errors import RowErrors
from written import collected

TOKENS = torch.randint(3, VOCAB, (16, 48), generator=torch.Generator().manual_seed(0))
ATTENTION = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
FORMATS = [parse_precision(name) for name in ("int4g32", "uint3g64", "nf4g64", "int2row", "ternaryrow")]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def opened(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    save_tiny(tiny_model("llama", tied=request.param).bfloat16(), path)
    checkpoint = open_checkpoint(path)
    layout = build_layout(checkpoint.config)
    return checkpoint, layout, collected(BlockStream(checkpoint, layout, torch.float32), TOKENS, path / "stats")


@pytest.mark.parametrize("names", [ATTENTION, ["model.layers.0.mlp.down_proj"], ["model.embed_tokens"]])
@pytest.mark.parametrize("module", [gptq, rtn])
def test_are_those_of_the_whole_weights(opened, names, module):
    checkpoint, layout, stats = opened
    method = WeightCompressor(module=module, config=module.Config(scales="mse"))
    rows = {name: torch.tensor([5, 0, 11]) for name in names}
    found = RowErrors(checkpoint, layout, stats, method).of_site(rows, FORMATS)
    assert list(found) == names
    for name in names:
        w = checkpoint.tensor(f"{name}.weight").float()
        for one, precision in zip(found[name], FORMATS, strict=True):
            runs = (Run(count=w.shape[1], precision=precision),)
            made = module.quantize(w, moments_of(layout, stats, layout.weights[name]), runs, method.config)
            expected = (made.dequantize() - w)[rows[name]]
            same = torch.isclose(one, expected, rtol=1e-3, atol=1e-5)
            assert float(same.float().mean()) > 0.97  # sums in another order decide a tie otherwise
            assert float(one.norm()) == pytest.approx(float(expected.norm()), rel=0.1)


def test_bf16_changes_nothing(opened):
    checkpoint, layout, stats = opened
    errors = RowErrors(checkpoint, layout, stats, WeightCompressor(module=gptq, config=gptq.Config()))
    assert not errors.of_site({ATTENTION[0]: torch.arange(4)}, [BF16])[ATTENTION[0]].any()  # the weights are of bf16
