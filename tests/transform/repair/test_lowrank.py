"""The pairs against numpy: the alternation step by step, the optimum of QERA as its paper writes it."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch

from plans import runs
from trimbit.calibrate.moments import Moments
from trimbit.errors import NumericsError, RecipeError
from trimbit.transform.quant import gptq, rtn
from trimbit.transform.repair import lowrank
from trimbit.transform.repair.lowrank import Config, LowRank

SHAPES = [(48, 32), (32, 48), (32, 32)]
COARSE = "int2g32"


def moments(h):
    return Moments(count=1000, h=h.float(), mean=torch.zeros(h.shape[0]))


def correlated(n, generator, tokens=2000):
    """H of inputs that correlate and differ in size; singular if there are fewer tokens than channels."""
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    x *= torch.exp(torch.randn(n, generator=generator))
    return x.T @ x / tokens


def rounding(cols, name=COARSE):
    return partial(rtn.quantize, moments=None, runs=runs((cols, name)), config=rtn.Config(scales="absmax"))


def weight_error(w, q, pair):
    return float((w.double() - q.dequantize() - pair.dense()).square().sum())


def output_error(d, h):
    return float(torch.einsum("ri,ij,rj->", d.double(), h, d.double()))


def cut(m, rank):
    """Numpy's SVD of m cut to the rank: U, singular values, V^T; and the rest of the singular values."""
    u, s, vt = np.linalg.svd(m.double().numpy(), full_matrices=False)
    return *(torch.from_numpy(part) for part in (u[:, :rank], s[:rank], vt[:rank])), s[rank:]


def assert_near(pair, want):
    """Equal but for the rounding of the pair, which is 2^-9 of each value at most."""
    assert (pair.dense() - want).norm() < 2**-8 * want.norm()


def root_of(h):
    values, vectors = np.linalg.eigh(h.numpy())
    return torch.from_numpy(vectors * np.sqrt(values.clip(0))) @ torch.from_numpy(vectors.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_step_of_loftq_is_the_svd(shape, generator):
    w = torch.randn(shape, generator=generator)
    q, pair = lowrank.loftq(w, rounding(shape[1]), Config(rank=5))
    plain = rounding(shape[1])(w)
    assert torch.equal(q.codes, plain.codes)
    u, s, vt, tail = cut(w - plain.dequantize(), 5)
    a, b = s.sqrt()[:, None] * vt, u * s.sqrt()
    signs = (pair.b.double() * u).sum(0).sign()
    torch.testing.assert_close(pair.a.double() * signs[:, None], a, rtol=2**-8, atol=1e-9)
    torch.testing.assert_close(pair.b.double() * signs, b, rtol=2**-8, atol=1e-9)
    assert weight_error(w, q, pair) == pytest.approx((tail**2).sum(), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["int2g32", "uint3row", "int4g32", "nf4g64"])
def test_loftq_keeps_the_best_of_a_naive_alternation(shape, name, generator):
    """Of PEFT's decomposition and our rounding; its whole LoftQ, below, needs bitsandbytes."""
    decompose = pytest.importorskip("peft.utils.loftq_utils")._low_rank_decomposition
    w = torch.randn(shape, generator=generator)
    quantize = rounding(shape[1], name)
    product, errors = torch.zeros(shape), []
    for _ in range(5):
        d = w - quantize(w - product).dequantize()
        found = decompose(d, reduced_rank=4)
        product = found["L"].bfloat16().float() @ found["R"].bfloat16().float()
        errors.append(float((d - product).double().square().sum()))
    found = [weight_error(w, *lowrank.loftq(w, quantize, Config(rank=4, iterations=n))) for n in range(1, 6)]
    assert found == pytest.approx([min(errors[:n]) for n in range(1, 6)], rel=1e-4)
    if name != "int2g32":  # there the first step may be the best
        assert found[4] < 0.99 * found[0]
    assert found[0] < float((w - quantize(w).dequantize()).square().sum())


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_loftq_is_that_of_peft_at_nf4(iterations, generator):
    """PEFT's source, on the processor in place of its accelerator; ours has scales in fp16 and pairs in bf16."""
    from peft.utils import loftq_utils

    scope = dict(vars(loftq_utils))
    source = inspect.getsource(loftq_utils.loftq_init)
    assert 'else "cuda"' in source
    exec(source.replace('else "cuda"', 'else "cpu"').partition("@torch.no_grad()\n")[2], scope)
    w = torch.randn(96, 128, generator=generator)
    with torch.no_grad():
        dense, a, b = scope["loftq_init"](w, 4, 8, iterations)
    theirs = float((w - dense - b @ a).square().sum())
    q, pair = lowrank.loftq(w, rounding(128, "nf4g64"), Config(rank=8, iterations=iterations))
    assert weight_error(w, q, pair) <= theirs * 1.005  # the best iterate is kept, theirs is the last
    if iterations == 1:
        assert weight_error(w, q, pair) == pytest.approx(theirs, rel=0.005)
        assert float((q.dequantize() - dense).abs().mean()) < 1e-3


@pytest.mark.parametrize("best", range(4))
def test_loftq_keeps_the_best_also_if_the_quantiser_gets_worse(best, generator):
    """The quantiser is exact to a noise that is least in the step `best`."""
    w, made = torch.randn(48, 32, generator=generator), []

    def quantize(x):
        assert x.shape == w.shape
        noise = 0.05 * (1 + abs(len(made) - best)) * torch.randn(w.shape, generator=generator)
        made.append(rounding(32, "int8g32")(w + noise))
        return made[-1]

    q, pair = lowrank.loftq(w, quantize, Config(rank=4, iterations=4))
    assert len(made) == 4
    assert q is made[best]
    u, s, vt, _ = cut(w - q.dequantize(), 4)
    assert_near(pair, u * s @ vt)


def test_loftq_keeps_the_plain_weight_if_no_pair_is_better(generator, monkeypatch):
    w = torch.randn(48, 32, generator=generator)
    monkeypatch.setattr(lowrank, "_project", lambda *_: LowRank(a=torch.ones(4, 32), b=torch.ones(48, 4)))
    q, pair = lowrank.loftq(w, rounding(32), Config(rank=4, iterations=3))
    assert torch.equal(q.dequantize(), rounding(32)(w).dequantize())
    assert not pair.dense().any()


@pytest.mark.parametrize("tokens", [2000, 10, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_qera_reaches_the_optimum(shape, tokens, generator):
    """The least output error is the sum of the squared singular values of (W - Q) H^1/2 beyond the rank."""
    w, h = torch.randn(shape, generator=generator), correlated(shape[1], generator, tokens)
    q = rounding(shape[1])(w).dequantize()
    d = w - q
    pair = lowrank.qera(w, q, moments(h), Config(init="qera", rank=4))
    u, s, vt, tail = cut(d.double() @ root_of(h), 4)
    least, got = (tail**2).sum(), output_error(d - pair.dense(), h)
    slack = 1e-4 * float((s**2).sum())  # the pair is rounded
    assert least - slack < got < least + slack
    if tokens > shape[1]:  # H has an inverse: B A is what the paper writes
        want = u * s @ vt @ torch.linalg.inv(root_of(h))
        assert_near(pair, want)
    for scale in np.geomspace(3e-3, 0.3, 20) if tokens > 2 else ():
        a, b = (x + scale * x.std() * torch.randn(x.shape, generator=generator) for x in (pair.a, pair.b))
        assert output_error(d - b @ a, h) > got


@pytest.mark.parametrize("shape", SHAPES)
def test_qera_on_a_singular_h_is_the_limit_of_damping(shape, generator):
    w, h = torch.randn(shape, generator=generator), correlated(shape[1], generator, tokens=10)
    q = rounding(shape[1])(w).dequantize()
    pair = lowrank.qera(w, q, moments(h), Config(init="qera", rank=4))
    root = root_of(h + 1e-7 * h.diagonal().mean() * torch.eye(shape[1]))
    u, s, vt, _ = cut((w - q).double() @ root, 4)
    want = u * s @ vt @ torch.linalg.inv(root)
    assert_near(pair, want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_each_is_the_better_one_by_its_own_measure(shape, method, generator):
    w, h = torch.randn(shape, generator=generator), correlated(shape[1], generator)
    quantize = rounding(shape[1])
    if method == "gptq":
        quantize = partial(gptq.quantize, moments=moments(h), runs=runs((shape[1], COARSE)), config=gptq.Config())
    found = {}
    for init in ("loftq", "qera"):
        q, pair = lowrank.correct(w, quantize, moments(h), Config(init=init, rank=4), generator)
        found[init] = w - q.dequantize() - pair.dense()
    plain = w - q.dequantize()
    assert output_error(found["qera"], h) < 0.95 * output_error(found["loftq"], h)
    assert found["loftq"].norm() < 0.99 * found["qera"].norm()
    assert found["qera"].norm() < plain.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_qera_on_white_inputs_is_the_svd(shape, generator):
    w = torch.randn(shape, generator=generator)
    q = rounding(shape[1])(w).dequantize()
    pair = lowrank.qera(w, q, moments(3 * torch.eye(shape[1])), Config(init="qera", rank=5))
    u, s, vt, _ = cut(w - q, 5)
    assert_near(pair, u * s @ vt)


@pytest.mark.parametrize("init", ["loftq", "qera"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_to_make_up_for_gives_nothing(init, shape, generator):
    w = torch.randn(shape, generator=generator).to(torch.bfloat16).float()
    quantize = rounding(shape[1], "bf16")
    q, pair = lowrank.correct(
        w, quantize, moments(correlated(shape[1], generator)), Config(init=init, iterations=2), generator
    )
    assert torch.equal(q.dequantize() + pair.dense(), w)


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_that_are_always_zero_are_no_trouble(shape, generator):
    w = torch.randn(shape, generator=generator)
    q = rounding(shape[1])(w).dequantize()
    pair = lowrank.qera(w, q, moments(torch.zeros(shape[1], shape[1])), Config(init="qera"))
    assert (w - q - pair.dense()).norm() < (w - q).norm()


def test_zeros_change_nothing(generator):
    w = torch.randn(48, 32, generator=generator)
    q, pair = lowrank.correct(w, rounding(32), None, Config(init="zeros"), torch.Generator().manual_seed(3))
    assert torch.equal(q.dequantize() + pair.dense(), rounding(32)(w).dequantize())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        want = torch.nn.Linear(32, 8, bias=False).weight.detach()  # LoRA draws A as a linear layer draws its weight
    assert torch.equal(pair.a, want.to(torch.bfloat16).float())


@pytest.mark.parametrize("init", ["zeros", "loftq", "qera"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_fit_bf16_and_are_balanced(init, shape, generator):
    w, h = torch.randn(shape, generator=generator), correlated(shape[1], generator)
    config = Config(init=init, rank=6, iterations=2)
    _, pair = lowrank.correct(w, rounding(shape[1]), moments(h), config, generator)
    assert (pair.a.shape, pair.b.shape) == ((6, shape[1]), (shape[0], 6))
    assert all(x.dtype == torch.float32 and torch.equal(x, x.to(torch.bfloat16).float()) for x in (pair.a, pair.b))
    if init != "zeros":
        torch.testing.assert_close(pair.a.norm(dim=1), pair.b.norm(dim=0), rtol=2**-7, atol=0)


@pytest.mark.parametrize("init", ["zeros", "loftq", "qera"])
def test_a_rank_beyond_the_weight_is_refused(init, generator):
    w, config = torch.ones(12, 32), Config(init=init, rank=13)
    with pytest.raises(RecipeError, match=r"rank 13 does not fit a weight of 12 x 32: the rank can be 12 at most"):
        lowrank.correct(w, rounding(32), moments(torch.eye(32)), config, generator)
    lowrank.correct(w, rounding(32), moments(torch.eye(32)), Config(init=init, rank=12), generator)


@pytest.mark.parametrize("init", ["zeros", "loftq", "qera"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_refused(init, value, generator):
    w = torch.ones(12, 32)
    w[3, 3] = value
    with pytest.raises(NumericsError, match="not finite"):
        lowrank.correct(w, rounding(32, "bf16"), moments(torch.eye(32)), Config(init=init), generator)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_h_that_is_not_finite_is_refused(value, generator):
    h = torch.eye(32)
    h[3, 3] = value
    with pytest.raises(NumericsError, match="H of a layer's inputs is not finite"):
        lowrank.correct(torch.ones(12, 32), rounding(32), moments(h), Config(init="qera"), generator)


def test_qera_asks_for_moments(generator):
    with pytest.raises(AssertionError, match="needs moments"):
        lowrank.correct(torch.ones(12, 32), rounding(32), None, Config(init="qera"), generator)
