"""Taps."""

import pytest
import torch

from trimbit.calibrate.taps import Tap


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
