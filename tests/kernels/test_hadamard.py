"""Hadamard matrices are ones and orthogonal; the transform in small products is the dense one."""

import hashlib

import pytest
import scipy.linalg
import torch

from trimbit.errors import PlanError
from trimbit.kernels.hadamard import factors, matrix, transform

CPU = torch.device("cpu")
# of SmolLM2, Llama 2 and 3, Qwen 2.5 and Phi 3, and of the tiny models
ORDERS = (1, 2, 8, 12, 20, 28, 36, 40, 48, 64, 76, 80, 96, 128, 144, 336, 576, 896, 1152, 1536, 2048, 3584, 4864)


def dense(n):
    product = torch.ones(1, 1)
    for order in factors(n):
        product = torch.kron(product, matrix(order, CPU))
    return product


@pytest.mark.parametrize("order", [2, 4, 12, 20, 24, 28, 36, 44, 60, 76, 108, 148, 1020])
def test_a_factor_is_a_hadamard_matrix(order):
    own = matrix(order, CPU).double()
    assert set(own.flatten().tolist()) == {1.0, -1.0}
    assert torch.equal(own @ own.T, order * torch.eye(order, dtype=torch.float64))


def test_both_constructions_of_paley_by_hand():
    # q = 11: the squares mod 11 are 1, 3, 4, 5 and 9
    row = [1 if j in {1, 3, 4, 5, 9} else -1 for j in range(11)]
    own = matrix(12, CPU)
    assert own[0].tolist() == [1.0] * 12
    assert own[1:, 0].tolist() == [-1.0] * 11
    assert own[1, 1:].tolist() == [1.0, *(float(row[-j % 11]) for j in range(1, 11))]
    # 36 has no first construction, 35 being no prime; q = 17
    assert own.trace() == 12
    assert torch.equal(matrix(36, CPU), matrix(36, CPU).T)


@pytest.mark.parametrize("n", ORDERS)
def test_the_transform_is_the_dense_one_and_turns_back(n):
    own = dense(n).double()
    assert own.shape == (n, n)
    for order in factors(n):  # the product of orthogonal factors is orthogonal
        factor = matrix(order, CPU).double()
        assert torch.equal(factor @ factor.T, order * torch.eye(order, dtype=torch.float64))
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n))
    want = (x.double() @ own / n**0.5).float()
    torch.testing.assert_close(transform(x), want, rtol=0, atol=2e-6 * n**0.25)
    torch.testing.assert_close(transform(transform(x), inverse=True), x, rtol=0, atol=5e-6)
    half = transform(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, transform(x.bfloat16().float()).bfloat16())


def test_powers_of_two_are_sylvesters_however_they_are_split():
    assert factors(4096) == (64, 64)
    assert factors(128) == (8, 16)
    torch.testing.assert_close(dense(512), torch.tensor(scipy.linalg.hadamard(512)).float())


def test_what_written_models_depend_on():
    """Another choice of factors or signs is another model: these may not change."""
    assert [factors(n) for n in (36, 48, 80, 576, 1536, 4864, 11008)] == [
        (36,), (12, 4), (20, 4), (12, 12, 4), (12, 8, 16), (76, 64), (5504, 2)
    ]  # fmt: skip
    known = {12: "db7478025ce74776", 20: "d04b560308676ee7", 36: "1a7aed2f42a8c71d", 76: "290dc2c593bbcba4"}
    for order, digest in known.items():
        entries = matrix(order, CPU).to(torch.int8).numpy().tobytes()
        assert hashlib.sha256(entries).hexdigest()[:16] == digest


def test_autocast_changes_nothing_and_gradients_turn_back():
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = transform(x)
    assert torch.equal(y, transform(x))
    up = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.autograd.grad(y, x, up)[0], transform(up, inverse=True))


def test_what_is_made_while_inferring_serves_training():
    matrix.cache_clear()
    with torch.inference_mode():
        transform(torch.ones(1, 24))
    x = torch.ones(1, 24, requires_grad=True)
    transform(x).sum().backward()


@pytest.mark.parametrize("n", [3, 6, 10, 92, 100, 172, 1100])
def test_an_order_that_cannot_be_made_is_named(n):
    """There are matrices of orders 92 and 172, but neither of Paley's; 100 is of a power of a prime."""
    with pytest.raises(PlanError, match=f"no Hadamard matrix of order {n} "):
        factors(n)
