"""Products of bf16 matrices, by fp32 instructions where there are no others."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from trimbit.model.forward import compute as products
from trimbit.model.forward.compute import RoundedProducts, fast_bf16, fastest_device, products_in

BF16 = torch.bfloat16


class Seen(TorchDispatchMode):
    """The dtypes of the matrices that products get."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in products._PRODUCTS:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def matrices(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(BF16) for shape in shapes]


def multiply(kind):
    a, b, x, w, bias, many = matrices((7, 40), (40, 9), (2, 5, 40), (9, 40), (9,), (2, 40, 3))
    return {
        "mm": lambda: (a @ b, a.float() @ b.float()),
        "bmm": lambda: (x @ many, x.float() @ many.float()),
        "linear": lambda: (functional.linear(x, w), functional.linear(x.float(), w.float())),
        "bias": lambda: (functional.linear(x, w, bias), functional.linear(x.float(), w.float(), bias.float())),
    }[kind]


@contextmanager
def plain():
    yield


@pytest.mark.parametrize("kind", ["mm", "bmm", "linear", "bias"])
@pytest.mark.parametrize("grad", [plain, torch.no_grad, torch.inference_mode])
def test_a_product_is_that_of_fp32_rounded(kind, grad):
    with grad(), Seen() as seen, RoundedProducts():
        found, exact = multiply(kind)()
    assert found.dtype is BF16
    assert torch.equal(found, exact.to(BF16))
    assert len(seen.dtypes) >= 2 and set(seen.dtypes) == {torch.float32}  # noqa: PT018


@pytest.mark.parametrize("again", [False, True])
def test_gradients_too(again):
    x, w, up = matrices((6, 40), (9, 40), (6, 9))
    x.requires_grad_(), w.requires_grad_()
    with Seen() as seen, RoundedProducts():
        y = checkpoint(functional.linear, x, w, use_reentrant=False) if again else functional.linear(x, w)
        y.backward(up)
    assert torch.equal(x.grad, (up.float() @ w.detach().float()).to(BF16))
    assert torch.equal(w.grad, (up.float().T @ x.detach().float()).to(BF16))
    assert set(seen.dtypes) == {torch.float32}


def test_gradients_of_attention():
    exact, found, kept = [], [], []
    for dtype, out, mode in ((torch.float32, exact, plain), (BF16, kept, plain), (BF16, found, RoundedProducts)):
        q, k, v, up = (one.to(dtype) for one in matrices((1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8)))
        q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        with Seen() as seen, mode():
            functional.scaled_dot_product_attention(q, k, v, is_causal=True).backward(up)
        out += [one.grad for one in (q, k, v)]
        assert set(seen.dtypes) == {BF16 if out is kept else torch.float32}
    for a, b, c in zip(exact, found, kept, strict=True):
        assert b.dtype is BF16
        assert (b - a).norm() <= 1.05 * (c - a).norm() < 0.02 * a.norm()  # no worse than PyTorch's own in bf16


def test_other_products_are_left_alone():
    a, b = (one.double() for one in matrices((7, 40), (40, 9)))
    with Seen() as seen, RoundedProducts():
        assert torch.equal(a @ b, torch.mm(a, b))
    assert set(seen.dtypes) == {torch.float64}


@pytest.mark.parametrize(("capability", "dtype"), [("AVX2", torch.float32), ("AVX512", BF16), ("DEFAULT", BF16)])
def test_only_where_there_are_no_bf16_instructions(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    x, w = (one.float() for one in matrices((6, 40), (9, 40)))
    with Seen() as seen, products_in(BF16):
        assert functional.linear(x, w).dtype is BF16
    with seen, fast_bf16():
        x.to(BF16) @ w.to(BF16).T
    assert set(seen.dtypes) == {dtype}
    with Seen() as seen, products_in(torch.float32):
        assert torch.equal(functional.linear(x, w), x @ w.T)
    assert set(seen.dtypes) == {torch.float32}


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_not_for_a_gpu_whatever_its_host(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    x, w = matrices((6, 40), (9, 40))
    with Seen() as seen, products_in(BF16, "cuda"):
        x @ w.T
    assert set(seen.dtypes) == {BF16}


@pytest.mark.parametrize(("free", "kind"), [(10_000, "cuda"), (9_999, "cpu")])
def test_a_gpu_that_is_too_small_is_left_alone(monkeypatch, caplog, free, kind):
    """With a warning: the CPU is much slower."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 20_000))
    assert fastest_device(10_000).type == kind
    assert ("falling back to the CPU" in caplog.text) is (kind == "cpu")
