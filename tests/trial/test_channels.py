"""What searches over channels read of a model, against a loop over its tokens and elements."""

import pytest
import torch

from site_inputs import TOKENS, inputs
from tiny import save_tiny, tiny_model
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream
from trimbit.schema.precision import Run, parse_precision
from trimbit.transform.quant import rtn
from trimbit.trial.channels import DAMPING, ChannelFigures
from written import collected

NAMES = ("model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The channels of a small model, and the inputs of its weights, in fp64."""
    path = tmp_path_factory.mktemp("llama")
    model = tiny_model("llama").bfloat16()
    save_tiny(model, path)
    checkpoint = open_checkpoint(path)
    model = model.float()  # the same numbers
    layout = build_layout(checkpoint.config)
    stream = BlockStream(checkpoint, layout, torch.float32)
    stats = collected(stream, TOKENS, tmp_path_factory.mktemp("stats"))
    channels = ChannelFigures(checkpoint=checkpoint, layout=layout, stats=stats)
    seen = inputs(model, layout, model.get_input_embeddings()(TOKENS))
    return channels, {site: x.bfloat16().double() for site, x in seen.items()}  # as a bf16 layer reads them


def weight(channels, name):
    return channels.checkpoint.tensor(f"{name}.weight").double(), channels.layout.weights[name].site


def test_energies_are_mean_squares(opened):
    channels, seen = opened
    found = channels.second_moments()
    assert found.keys() == {w.site for w in channels.layout.weights.values() if channels.layout.readers(w.site)}
    for site, own in found.items():
        torch.testing.assert_close(torch.tensor(own), seen[site].square().mean(0).float(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_salience(opened, name):
    channels, seen = opened
    w, site = weight(channels, name)
    h = seen[site].T @ seen[site] / len(seen[site])
    inverse = torch.linalg.inv(h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64))
    want = [sum(float(w[i, j] ** 2 / inverse[j, j] ** 2) for i in range(len(w))) for j in range(w.shape[1])]
    assert channels.salience(name) == pytest.approx(want, rel=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_of_rounding_is_that_of_the_outputs(opened, name):
    channels, seen = opened
    w, site = weight(channels, name)
    half = w.shape[1] // 2
    counts = {"int2g32": half, "int4g32": w.shape[1] - half}
    runs = tuple(Run(count=count, precision=parse_precision(name)) for name, count in counts.items())
    q = rtn.quantize(w.float(), None, runs, rtn.Config(scales="mse")).dequantize().double()
    want = (seen[site] @ (w - q).T).square().sum(1).mean()
    assert channels.rounding_error(name, runs) == pytest.approx(float(want), rel=5e-3)
