"""Moments of every site against a direct computation with hooks on the plain transformers model."""

import pytest
import torch
from safetensors.torch import load_file

from tiny import VOCAB, save_tiny, tiny_model
from trimbit.calibrate import moments
from trimbit.calibrate.moments import Accumulator, Moments
from trimbit.calibrate.stats import collect, stored
from trimbit.calibrate.taps import Tap
from trimbit.model.build import build_layout
from trimbit.model.checkpoint.open import open_checkpoint
from trimbit.model.forward.stream import BlockStream

TOKENS = torch.randint(3, VOCAB, (6, 20), generator=torch.Generator().manual_seed(0))


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


@torch.no_grad()
def inputs(model, layout, embedded):
    """What each weight reads, in the plain model."""
    seen, handles = {}, []
    for weight in layout.weights.values():
        if weight.site != "embed":
            module = model.get_submodule("lm_head" if weight.site == "head_in" else weight.name)
            see = lambda _module, args, site=weight.site: seen.__setitem__(site, args[0].flatten(0, -2))  # noqa: E731
            handles.append(module.register_forward_pre_hook(see))
    model(inputs_embeds=embedded, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


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


def test_products_of_bf16_inputs_are_exact():
    x = torch.randn(300, 9, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    y = torch.randn(300, 5, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    expected = (x.double().T @ y.double()).float()
    torch.testing.assert_close(moments.bf16_gram(x, y), expected, atol=1e-4, rtol=1e-5)
    before = torch.backends.mkldnn.matmul.fp32_precision
    moments.bf16_gram(x, y)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_accumulators_add_up_with_the_dense_path_beside():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 4, generator=generator).bfloat16()
    dense = torch.randn(40, 6, generator=generator).bfloat16()
    first, second = Accumulator(), Accumulator()
    first.add(x[:7], dense[:7])
    first.add(x[7:20], dense[7:20])
    second.add(x[20:], dense[20:])
    found = first.plus(second).moments()
    x, dense = x.float(), dense.float()
    assert found.count == 40
    for name, expected in {
        "h": x.T @ x / 40,
        "mean": x.mean(0),
        "cross": dense.T @ x / 40,
        "dense_mean": dense.mean(0),
    }.items():
        torch.testing.assert_close(getattr(found, name), expected, atol=1e-5, rtol=1e-5)
    assert first.moments().count == 20


def test_moments_of_some_channels():
    h, cross = torch.arange(16.0).view(4, 4), torch.arange(20.0).view(5, 4)
    index = torch.tensor([3, 1])
    found = Moments(count=2, h=h, mean=torch.arange(4.0), cross=cross, dense_mean=torch.arange(5.0)).at(index)
    assert found.h.tolist() == [[15.0, 13.0], [7.0, 5.0]]
    assert found.mean.tolist() == [3.0, 1.0]
    assert found.cross.tolist() == cross[:, [3, 1]].tolist()
    assert found.dense_mean.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert Moments(count=2, h=h, mean=torch.arange(4.0)).at(index).cross is None


def test_a_tap_sees_and_stops():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    ran = []
    second.register_forward_hook(lambda *_: ran.append(1))
    both, x = torch.nn.Sequential(first, second), torch.ones(2, 4, 3)
    with Tap({"x": first, "y": second}) as seen:
        both(x)
    assert seen["x"].shape == (8, 3)
    assert ran == [1]
    with Tap({"y": second}, stop_at="y") as seen:
        both(x)
    assert seen.keys() == {"y"}
    assert ran == [1]
    both(x)
    assert ran == [1, 1]
    with pytest.raises(RuntimeError, match="shapes"), Tap({"x": first}):
        both(torch.ones(2, 5))
