"""The rotation itself."""

import torch

from rotations import ROTATION, dense_h, dense_q
from trimbit.runtime.rotation import turn, turn_back
from trimbit.schema.plan import Rotation

SIGNS = [1, -1, 1, 1, -1, -1, 1, -1, -1, -1, -1, -1, -1, 1, 1, -1]  # of seed 0


def test_the_signs_never_change_and_the_seed_decides_them():
    q = dense_q(16, Rotation())
    torch.testing.assert_close(q, torch.diag(torch.tensor(SIGNS).double()) @ dense_h(16), rtol=0, atol=1e-6)
    torch.testing.assert_close(q @ q.T, torch.eye(16).double(), rtol=0, atol=1e-6)
    assert not torch.equal(q, dense_q(16, Rotation(seed=1)))
    x = torch.randn(5, 576, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn_back(turn(x, ROTATION), ROTATION), x, rtol=0, atol=1e-5)
    assert turn(x.bfloat16(), ROTATION).dtype == torch.bfloat16
