"""Codes of keys and values against a loop over single tokens, heads and groups in numpy."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from trimbit.errors import NumericsError
from trimbit.kernels.kv import dequantize_tokens, quantize_tokens
from trimbit.schema.kv_cache import KVPrecision


def naive(row, bits, group):
    """The codes as one number, scales, minima, and the values, of one token's keys in one head."""
    number, scales, minima, values = 0, [], [], []
    for at in range(0, len(row), group or len(row)):
        part = row[at : at + (group or len(row))]
        low = np.float16(part.min())
        scale = np.float16(max((part.max() - np.float32(low)) / np.float32(2**bits - 1), 0))
        for i, x in enumerate(part):
            code = int(np.clip(np.rint((x - np.float32(low)) / np.float32(scale)), 0, 2**bits - 1)) if scale else 0
            number |= code << ((at + i) * bits)
            values.append(np.float32(code) * np.float32(scale) + np.float32(low))
        scales.append(scale)
        minima.append(low)
    return number, scales, minima, values


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("channels", "group"), [(8, None), (16, 8), (13, 5), (7, 7), (5, 1)])
def test_against_a_loop(bits, channels, group, generator):
    precision = KVPrecision(bits=bits, group=group)
    x = 3 * torch.randn(2, 3, 4, channels, generator=generator) + 5 * torch.randn(channels, generator=generator)
    x[0, 0, 0] = 1.5  # a range of zero
    codes, scales, minima = quantize_tokens(x, precision)
    assert (codes.dtype, scales.dtype, minima.dtype) == (torch.uint8, torch.float16, torch.float16)
    values = dequantize_tokens(codes, scales, minima, precision, channels, torch.float32)
    assert values.shape == x.shape
    for at in np.ndindex(2, 3, 4):
        number, want_scales, want_minima, want = naive(x[at].numpy(), bits, group)
        assert int.from_bytes(bytes(codes[at].tolist()), "little") == number
        assert scales[at].tolist() == [float(scale) for scale in want_scales]
        assert minima[at].tolist() == [float(low) for low in want_minima]
        assert values[at].tolist() == [float(value) for value in want]
    stored = sum(part[0, 0, 0].numel() * part.element_size() for part in (codes, scales, minima))
    assert stored == precision.token_nbytes(channels)


def test_by_hand():
    precision = KVPrecision(bits=2)
    x = torch.tensor([[-1.0, 0.4, 2.0, 0.6]])
    codes, scales, minima = quantize_tokens(x, precision)
    assert codes.tolist() == [[0b10_11_01_00]]
    assert (scales.tolist(), minima.tolist()) == ([[1.0]], [[-1.0]])
    assert dequantize_tokens(codes, scales, minima, precision, 4, torch.bfloat16).tolist() == [[-1.0, 0.0, 2.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_half_a_step_and_falls_with_bits(dtype, generator):
    x = (torch.randn(50, 64, generator=generator) + 3).to(dtype)
    errors = []
    for bits in range(2, 9):
        precision = KVPrecision(bits=bits, group=32)
        codes, scales, minima = quantize_tokens(x, precision)
        error = dequantize_tokens(codes, scales, minima, precision, 64, torch.float32) - x.float()
        fp16 = 2.0**-11  # of the scale, times all steps, and of the minimum
        bound = scales.float() * (0.5 + 2**bits * fp16) + minima.float().abs() * fp16
        assert bool((error.abs() <= bound.repeat_interleave(32, dim=1) * (1 + 1e-5)).all())
        errors.append(error.square().mean().item())
    for coarse, fine in pairwise(errors):
        assert fine < 0.4 * coarse


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -1e5, 1e7])
def test_what_does_not_fit_is_refused(value):
    x = torch.zeros(2, 8)
    x[1, 3] = value
    with pytest.raises(NumericsError, match="does not fit fp16"):
        quantize_tokens(x, KVPrecision())
