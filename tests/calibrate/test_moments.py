"""Sums of second moments."""

import torch

from trimbit.calibrate import moments
from trimbit.calibrate.moments import Accumulator, Moments


def test_products_of_bf16_inputs_are_exact():
    x = torch.randn(300, 9, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    y = torch.randn(300, 5, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    expected = (x.double().T @ y.double()).float()
    torch.testing.assert_close(moments.bf16_gram(x, y), expected, atol=1e-4, rtol=1e-5)
    before = torch.backends.mkldnn.matmul.fp32_precision
    moments.bf16_gram(x, y)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_accumulators_add_up_with_the_dense_path_beside():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 4, generator=generator).bfloat16()
    dense = torch.randn(40, 6, generator=generator).bfloat16()
    first, second = Accumulator(), Accumulator()
    first.add(x[:7], dense[:7])
    first.add(x[7:20], dense[7:20])
    second.add(x[20:], dense[20:])
    found = first.plus(second).moments()
    x, dense = x.float(), dense.float()
    assert found.count == 40
    for name, expected in {
        "h": x.T @ x / 40,
        "mean": x.mean(0),
        "cross": dense.T @ x / 40,
        "dense_mean": dense.mean(0),
    }.items():
        torch.testing.assert_close(getattr(found, name), expected, atol=1e-5, rtol=1e-5)
    assert first.moments().count == 20


def test_moments_of_some_channels():
    h, cross = torch.arange(16.0).view(4, 4), torch.arange(20.0).view(5, 4)
    index = torch.tensor([3, 1])
    found = Moments(count=2, h=h, mean=torch.arange(4.0), cross=cross, dense_mean=torch.arange(5.0)).at(index)
    assert found.h.tolist() == [[15.0, 13.0], [7.0, 5.0]]
    assert found.mean.tolist() == [3.0, 1.0]
    assert found.cross.tolist() == cross[:, [3, 1]].tolist()
    assert found.dense_mean.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert Moments(count=2, h=h, mean=torch.arange(4.0)).at(index).cross is None
