"""Inverses of damped second moments; a matrix that is not positive definite is an error."""

import torch
from jaxtyping import Float
from torch import Tensor

from trimbit.errors import NumericsError


def damped(h: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """H + damping * mean(diag H) * I."""
    mean = h.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return h + damping * mean * torch.eye(h.shape[0], dtype=h.dtype, device=h.device)


def damped_inverse(h: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """The inverse of the damped H.

    Raises:
        NumericsError: if H is not finite, or the damped H not positive definite, naming a damping that would work.
    """
    return torch.cholesky_inverse(_cholesky(h, damping))


def inverse_factor(h: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """U upper triangular with U^T U = (H + damping * mean(diag H) * I)^-1.

    With rows and columns in reverse order, H = L L^T; in the right order L is upper triangular, and U is its inverse.

    Raises:
        NumericsError: if H is not finite, or the damped H not positive definite, naming a damping that would work.
    """
    upper = _cholesky(h.flip(0, 1), damping).flip(0, 1)
    inverse: Tensor = torch.linalg.solve_triangular(
        upper, torch.eye(len(h), dtype=h.dtype, device=h.device), upper=True
    )
    return inverse


def _cholesky(h: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of the damped H."""
    if not bool(h.isfinite().all()):
        raise NumericsError("the second moment H of a layer's inputs is not finite: the model overflows on this text")
    factor, failed = torch.linalg.cholesky_ex(damped(h, damping))
    if bool(failed):
        eigenvalues = torch.linalg.eigvalsh(h)
        need = max(2 * float(-eigenvalues[0] / h.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)), 1e-6)
        raise NumericsError(
            f"H is not positive definite with damping {damping:g}: its eigenvalues range from {eigenvalues[0]:.3g} to "
            f"{eigenvalues[-1]:.3g}; use a damping of {need:.1g}, or try more calibration text"
        )
    lower: Tensor = factor
    return lower
