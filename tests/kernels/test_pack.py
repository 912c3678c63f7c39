"""Dense packing: the bits of a row are one little-endian number."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from trimbit.kernels.pack import pack, unpack


@st.composite
def rows_of_codes(draw):
    bits = draw(st.integers(1, 8))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 41)))
    return bits, torch.from_numpy(draw(npst.arrays("uint8", shape, elements=st.integers(0, 2**bits - 1))))


@given(rows_of_codes())
def test_pack_is_one_little_endian_number_and_unpack_its_inverse(case):
    bits, codes = case
    packed = pack(codes, bits)
    assert packed.shape == (codes.shape[0], -(-codes.shape[1] * bits // 8))
    for row, want in zip(packed.tolist(), codes.tolist(), strict=True):
        assert int.from_bytes(bytes(row), "little") == sum(code << (i * bits) for i, code in enumerate(want))
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_reads_strided_rows_and_ignores_the_padding(bits):
    codes = torch.randint(2**bits, (5, 13), dtype=torch.uint8)
    wide = torch.full((5, 40), 255, dtype=torch.uint8)
    packed = pack(codes, bits)
    wide[:, 3 : 3 + packed.shape[1]] = packed
    if free := packed.shape[1] * 8 - 13 * bits:
        wide[:, 2 + packed.shape[1]] |= 256 - 2 ** (8 - free)
    assert torch.equal(unpack(wide[:, 3 : 3 + packed.shape[1]], bits, 13), codes)
