"""Inverses of damped second moments; a matrix that is not positive definite is an error.

H is factored as D^-1 C D^-1, where C has a diagonal of ones. Channels whose sizes differ by orders of magnitude then do
no harm, and fp32 is enough; where it is not, fp64 is tried.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from trimbit.errors import NumericsError

TINY = torch.finfo(torch.float32).tiny


def damped(h: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """H + damping * mean(diag H) * I."""
    found = h.clone()
    found.diagonal().add_(damping * h.diagonal().mean().clamp(min=TINY))
    return found


def damped_inverse(h: Float[Tensor, "n n"], damping: float) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """C^-1 and d, for which D C^-1 D is the inverse of the damped H.

    Raises:
        NumericsError: if H is not finite, or the damped H not positive definite, naming a damping that would work.
    """
    factor, d = _cholesky(h, damping)
    return torch.cholesky_inverse(factor), d


def inverse_factor(h: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """U upper triangular with U^T U = (H + damping * mean(diag H) * I)^-1.

    With rows and columns in reverse order, C = L L^T; in the right order L is upper triangular, and U is its inverse,
    its columns times d.

    Raises:
        NumericsError: if H is not finite, or the damped H not positive definite, naming a damping that would work.
    """
    factor, d = _cholesky(h.flip(0, 1), damping)
    eye = torch.eye(len(h), dtype=factor.dtype, device=h.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor.flip(0, 1), eye, upper=True)
    return inverse.mul_(d.flip(0))


def _cholesky(h: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor of C, and d."""
    if not bool(h.isfinite().all()):
        raise NumericsError("the second moment H of a layer's inputs is not finite: the model overflows on this text")
    for dtype in (torch.float32, torch.float64):
        own = damped(h.to(dtype), damping)
        d = own.diagonal().clamp(min=TINY).rsqrt()
        own.mul_(d[:, None]).mul_(d)
        factor, failed = torch.linalg.cholesky_ex(own)
        if not bool(failed) and bool(factor.diagonal().isfinite().all()):
            return factor, d
    eigenvalues = torch.linalg.eigvalsh(h.double())
    need = max(2 * float(-eigenvalues[0] / h.diagonal().mean().clamp(min=TINY)), 1e-6)
    raise NumericsError(
        f"H is not positive definite with damping {damping:g}: its eigenvalues range from {eigenvalues[0]:.3g} to "
        f"{eigenvalues[-1]:.3g}; use a damping of {need:.1g}, or try more calibration text"
    )
