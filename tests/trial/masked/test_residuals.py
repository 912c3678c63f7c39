"""Residuals of low rank."""

import pytest
import torch

from trimbit.transform.quant import gptq
from trimbit.trial.masked.residuals import Residuals


@pytest.mark.parametrize("rank", [0, 20, 80, 100])
def test_residuals_of_low_rank_have_the_mean_squares_of_all(rank, generator):
    x = torch.randn(400, 80, generator=generator) @ torch.randn(80, 80, generator=generator)
    h = (x.T @ x / len(x)).double()
    exact = gptq.residuals(h, (60, 20), gptq.Config(damping=0.0)).double()
    found = Residuals(exact, h, rank, torch.float32)
    r = found(x)
    want = x.double() @ exact.T
    torch.testing.assert_close(r.square().mean(0), want.square().mean(0).float(), rtol=1e-3, atol=0)
    scaled = x * (want.square().mean(0) / x.square().mean(0)).sqrt()  # without any prediction
    missed, nothing = ((own - want).square().mean() for own in (r, scaled))
    if rank:
        assert missed < (0.9 if rank < 80 else 1e-6) * nothing
    else:
        assert float(missed / nothing) == pytest.approx(1, rel=1e-4)
    grad = torch.randn(r.shape, generator=generator)
    leaf = x.requires_grad_()
    (found(leaf) * grad).sum().backward()
    torch.testing.assert_close(found.back(grad), leaf.grad)
