"""Sums of second moments."""

import pytest
import torch

from trimbit.calibrate.moments import Accumulator, Moments, add_gram, mirrored


def test_moments_are_those_of_inputs_rounded_to_bf16_on_every_machine():
    generator = torch.Generator().manual_seed(1)
    x, dense = torch.randn(300, 9, generator=generator), torch.randn(300, 5, generator=generator)
    total = Accumulator()
    total.add(x, dense)
    found = total.moments()
    read, dense_read = x.bfloat16().double(), dense.bfloat16().double()
    for name, expected in {
        "h": read.T @ read,
        "mean": read.sum(0),
        "cross": dense_read.T @ read,
        "dense_mean": dense_read.sum(0),
    }.items():
        torch.testing.assert_close(getattr(found, name).double(), expected / 300, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 256, 257, 700, 5000])
def test_a_gram_matrix_is_summed_by_its_lower_triangle(n):
    x = torch.randn(20, n, generator=torch.Generator().manual_seed(n))
    total = torch.zeros(n, n)
    for part in x.split(13):
        add_gram(total, part)
    torch.testing.assert_close(mirrored(total), x.T @ x, atol=1e-4, rtol=1e-4)


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
