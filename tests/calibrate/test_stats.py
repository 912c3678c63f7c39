"""Moments of every site against a direct computation with hooks on the plain transformers model."""

import pytest
import torch
from safetensors.torch import load_file

from site_inputs import TOKENS, inputs
from tiny import save_tiny, tiny_model
from trimbit.calibrate.stats import collect, stored
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
    steps = []
    found = collect(stream, TOKENS, tmp_path_factory.mktemp("stats"), lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    return found


def test_equal_a_direct_computation(stream, collected):
    embedded = stream.embed(TOKENS)  # Gemma scales it in bf16
    torch.testing.assert_close(embedded, stream.model.get_input_embeddings()(TOKENS), atol=1e-6, rtol=2**-7)
    seen = inputs(stream.model, stream.layout, embedded)
    sites = {weight.site for weight in stream.layout.weights.values()} - {"embed"}
    assert seen.keys() == sites
    for site, x in seen.items():
        found, x = collected.moments(site), x.double()
        h = (x.T @ x / len(x)).float()
        assert found.count == TOKENS.numel() == len(x)
        torch.testing.assert_close(found.mean, x.mean(0).float(), atol=1e-4, rtol=1e-3)
        # products have bf16 factors: each is within 2^-8 of itself
        bound = 2**-7 * (x.abs().T @ x.abs() / len(x)).float() + 1e-5
        assert bool(((found.h - h).abs() <= bound).all()), site
        assert (found.h - h).norm() < 2e-3 * h.norm(), site
        torch.testing.assert_close(found.h, found.h.T, atol=1e-6, rtol=1e-5)


def test_what_is_stored_is_found_again_and_only_when_whole(stream, collected, tmp_path):
    again = stored(collected.folder, 3, TOKENS.numel())
    torch.testing.assert_close(again.moments("head_in").h, collected.moments("head_in").h, atol=0, rtol=0)
    assert again.count == TOKENS.numel()
    assert stored(tmp_path, 3, 1) is None

    def kill(done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(stream, TOKENS, tmp_path, kill)
    assert stored(tmp_path, 3, TOKENS.numel()) is None
    assert not list(tmp_path.glob("*.tmp"))
    collect(stream, TOKENS, tmp_path, lambda *_: None)
    for file in collected.folder.iterdir():
        assert load_file(file).keys() == load_file(tmp_path / file.name).keys()
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
