"""Moments of every site against a direct computation with hooks on the plain transformers model."""

import pytest
import torch
from safetensors.torch import load_file

from site_inputs import TOKENS, inputs
from tiny import save_tiny, tiny_model
from trimbit.calibrate import stats
from trimbit.calibrate.moments import Accumulator
from trimbit.calibrate.stats import Stats, collect
from trimbit.jobs import carried
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen2"])
def stream(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param).bfloat16()
    save_tiny(model, path)
    checkpoint = open_checkpoint(path)
    opened = BlockStream(checkpoint, build_layout(checkpoint.config), torch.float32)
    opened.model = model.float()  # the same numbers, whole
    return opened


@pytest.fixture(scope="module")
def collected(stream, tmp_path_factory):
    steps, folder = [], tmp_path_factory.mktemp("stats")
    collect(stream, TOKENS, folder, lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    return Stats(folder, TOKENS.numel())


def test_equal_a_direct_computation(stream, collected):
    embedded = stream.embed(TOKENS)  # Gemma scales it in bf16
    torch.testing.assert_close(embedded, stream.model.get_input_embeddings()(TOKENS), atol=1e-6, rtol=2**-7)
    seen = inputs(stream.model, stream.layout, embedded)
    sites = {weight.site for weight in stream.layout.weights.values()} - {"embed"}
    assert seen.keys() == sites
    for site, x in seen.items():
        found, x = collected.moments(site), x.bfloat16().double()  # as a bf16 layer reads them
        h = (x.T @ x / len(x)).float()
        assert found.count == TOKENS.numel() == len(x)
        torch.testing.assert_close(found.mean, x.mean(0).float(), atol=1e-3, rtol=1e-3)
        assert (found.h - h).norm() < 1e-3 * h.norm(), site  # sums in another order round some inputs otherwise
        torch.testing.assert_close(found.h, found.h.T, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("seconds", "left"), [(0.0, [(3, 3)]), (60.0, [(1, 3), (2, 3), (3, 3)])])
def test_an_interrupted_sweep_goes_on_to_the_same_bytes(stream, collected, tmp_path, monkeypatch, seconds, left):
    """From the last block after which enough time had passed to keep what goes into the next."""
    monkeypatch.setattr(carried, "SECONDS", seconds)

    def kill(done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(stream, TOKENS, tmp_path, kill)
    assert not (tmp_path / "head_in.safetensors").exists()
    assert not list(tmp_path.glob("*.tmp"))
    steps = []
    collect(stream, TOKENS, tmp_path, lambda *step: steps.append(step))
    assert steps == left
    assert {file.name for file in collected.folder.iterdir()} == {file.name for file in tmp_path.iterdir()}
    for file in collected.folder.iterdir():
        assert load_file(file).keys() == load_file(tmp_path / file.name).keys()
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_what_is_stored_is_half_of_a_triangle_and_as_good(tmp_path, monkeypatch):
    """With several bands; means far larger than deviations, a channel that never changes and one that is zero."""
    monkeypatch.setattr(stats, "BAND", 16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    x[:, :10] += 500.0
    x[:, 10], x[:, 11] = 0.0, 3.0
    total = Accumulator()
    total.add(x)
    stats._store(tmp_path / "head_in.safetensors", {"head_in": total})
    expected, found = total.moments(), Stats(tmp_path, 4000).moments("head_in")
    assert torch.equal(found.h, found.h.T)
    covariance, own = (one.h.double() - one.mean.double().outer(one.mean.double()) for one in (expected, found))
    scale = covariance.diagonal().clamp(min=1e-3).sqrt()
    assert float(((own - covariance) / scale[:, None] / scale).abs().max()) < 2e-2  # fp32 of a mean square of 250,000
    varying = [at for at in range(40) if at > 11]
    error = (own - covariance)[varying][:, varying] / scale[varying, None] / scale[varying]
    assert float(error.abs().max()) < 2**-11
    assert float(torch.linalg.eigvalsh(own[varying][:, varying]).min()) > 0
    assert (tmp_path / "head_in.safetensors").stat().st_size < 0.45 * 4 * 40 * 40 + 1000
