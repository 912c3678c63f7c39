"""Hadamard transforms of any order that is a product of known orders, by small matrix products in fp32.

A Hadamard matrix has entries 1 and -1 and orthogonal rows. Sylvester's have the orders 2^k; from a prime q, Paley
(J. Math. Phys. 12, 1933) makes one of order q + 1 if q = 3 mod 4, and of order 2 (q + 1) if q = 1 mod 4. Kronecker
products of Hadamard matrices are Hadamard matrices.
"""

from functools import cache

import torch
from jaxtyping import Float
from scipy.linalg import hadamard
from torch import Tensor

from trimbit.errors import PlanError

MOST_BITS = 6  # ours: a power of two is split into factors of at most 2^6


@cache
def factors(n: int) -> tuple[int, ...]:
    """Orders of matrices whose Kronecker product has order n, Paley's first; written models depend on this choice.

    Raises:
        PlanError: if none are known.
    """
    if n > 0 and n & (n - 1) == 0:
        bits = n.bit_length() - 1
        parts = -(-bits // MOST_BITS)
        return tuple(2 ** (bits * (at + 1) // parts - bits * at // parts) for at in range(parts))
    for order in range(12, n + 1, 4):
        if n % order == 0 and order & (order - 1) and _paley(order) is not None:
            try:
                return (order, *factors(n // order))
            except PlanError:
                continue
    raise PlanError(f"no Hadamard matrix of order {n} can be built from Sylvester's and Paley's matrices")


@cache
def matrix(order: int, device: torch.device) -> Float[Tensor, "order order"]:
    """The Hadamard matrix of one factor."""
    with torch.inference_mode(mode=False), torch.device("cpu"):  # the cached matrix must also serve training
        own = torch.tensor(hadamard(order)) if order & (order - 1) == 0 else _paley(order)
        assert own is not None, f"{order} is no factor"
        return own.to(device, torch.float32)


def transform(x: Float[Tensor, "*batch n"], *, inverse: bool = False) -> Float[Tensor, "*batch n"]:
    """The product x H / sqrt(n), or x H^T / sqrt(n) if `inverse`, in the dtype of x; in fp32 even under autocast.

    Raises:
        PlanError: if no H of this order is known.
    """
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = x.float() / x.shape[-1] ** 0.5
        for order in factors(x.shape[-1]):  # each factor transforms one axis, which is moved to the end
            own = matrix(order, x.device)
            y = (y.unflatten(-1, (order, -1)).transpose(-1, -2) @ (own.T if inverse else own)).flatten(-2)
        return y.to(x.dtype)


def _paley(order: int) -> Tensor | None:
    """Paley's matrix of this order; None if no prime q gives one."""
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        return _jacobsthal(q, -1) + torch.eye(order)
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and _is_prime(q):
        on, off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        return torch.kron(_jacobsthal(q, 1), off) + torch.kron(torch.eye(q + 1), on)
    return None


def _jacobsthal(q: int, side: int) -> Tensor:
    """1 if i - j is a square mod q, else -1; 0 if i = j; with a border of ones on top and of `side` on the left."""
    character = torch.full((q,), -1.0)
    character[torch.arange(1, q).square() % q] = 1.0
    character[0] = 0.0
    at = torch.arange(q)
    bordered = torch.zeros(q + 1, q + 1)
    bordered[0, 1:], bordered[1:, 0] = 1.0, side
    bordered[1:, 1:] = character[(at[:, None] - at) % q]
    return bordered


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, int(q**0.5) + 1))
