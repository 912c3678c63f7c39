"""Packed layers by hand."""

import torch

from plans import runs
from trimbit.runtime.layers import PackedLinear


def test_packed_linear_by_hand():
    linear = PackedLinear(2, runs((2, "int8row")), bias=True, dtype=torch.float32)
    linear.codes.copy_(torch.tensor([[129, 126], [128, 228]], dtype=torch.uint8))  # 1 -2; 0 100
    linear.scales.copy_(torch.tensor([[0.5], [0.25]]))
    linear.bias.data.copy_(torch.tensor([10.0, 20.0]))
    assert linear(torch.tensor([[[2.0, 3.0]]])).tolist() == [[[10 + 0.5 * (2 - 6), 20 + 0.25 * 300]]]


def test_packed_linear_of_trits_and_signs_by_hand():
    linear = PackedLinear(1, runs((6, "ternaryrow"), (3, "mbinaryrow")), bias=False, dtype=torch.float32)
    trits = 2 + 0 * 3 + 1 * 9 + 2 * 27 + 2 * 81  # 1 -1 0 1 1, and -1 in the next byte
    linear.codes.copy_(torch.tensor([[trits, 0, 0b101]], dtype=torch.uint8))
    linear.scales.copy_(torch.tensor([[0.5, 0.25]]))
    linear.zeros.copy_(torch.tensor([[2.0]]).half().view(torch.uint8))
    assert linear(torch.eye(9)).flatten().tolist() == [0.5, -0.5, 0.0, 0.5, 0.5, -0.5, 2.25, 1.75, 2.25]
